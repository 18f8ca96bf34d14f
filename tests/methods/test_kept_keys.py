"""Kept keys against brute force: every cut of every method, step by step through decode."""

import math
from itertools import combinations

import numpy as np
import pytest

from cab_attention import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    EvictingCache,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from cab_attention.cache_layer import EvictingLayer
from tests.feeding import feed, tiny_model_with_key_gains
from tests.methods.bare_layers import DIM, N_PROMPT, assert_kept_as_brute_force, forward, layers_of, random_steps
from tests.methods.brute_force import BruteForceLayer
from tests.methods.distinct_tokens import left_padded_distinct

METHODS = {
    "streaming_llm": StreamingLLM,
    "streaming_llm no sinks": lambda b: StreamingLLM(b, sinks=0),
    "streaming_llm 9 sinks": lambda b: StreamingLLM(b, sinks=9),
    "h2o": H2O,
    "h2o recent 0": lambda b: H2O(b, recent=0),
    "h2o recent 3": lambda b: H2O(b, recent=3),
    "snapkv": lambda b: SnapKV(b, window=8),
    "snapkv max 7": lambda b: SnapKV(b, window=8, kernel_size=7, pooling="max"),
    "snapkv no pooling": lambda b: SnapKV(b, window=3, kernel_size=1),
    "snapkv default": SnapKV,
    "pyramidkv": lambda b: PyramidKV(b, window=8),
    "pyramidkv beta 3": lambda b: PyramidKV(b, window=3, beta=3),
    "adakv": lambda b: AdaKV(b, window=8),
    "adakv safeguard half": lambda b: AdaKV(b, window=3, safeguard=0.5),  # whose fractions are equal
    "adakv no safeguard": lambda b: AdaKV(b, window=3, kernel_size=1, safeguard=0),
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "expected_attention 9 sinks": lambda b: ExpectedAttention(b, sinks=9, n_future=3),
    "tova": TOVA,
    "cab": lambda b: CAB(b, block_size=4),
    "cab odd blocks": lambda b: CAB(b, block_size=3, local_ratio=0.1, bridge_ratio=0.6, importance_ratio=0.3),
    "cab redundancy": lambda b: CAB(b, block_size=4, bridge="redundancy", redundancy=1.0),
    "cab median": lambda b: CAB(b, bridge="median"),
    "cab without graph": lambda b: CAB(b, block_size=32),
}


N_LAYERS = {"pyramidkv": 4, "pyramidkv beta 3": 3}


def steps_for(name, *args, **kwargs):
    return random_steps(*args, n_layers=N_LAYERS.get(name, 1), **kwargs)


@pytest.mark.parametrize("budget", [1, 2, 8, 17, N_PROMPT - 1, N_PROMPT, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_prompt_and_decode(name, budget):
    assert_kept_as_brute_force(METHODS[name](budget), steps_for(name))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_grouped_heads(name, heads):
    assert_kept_as_brute_force(METHODS[name](24), steps_for(name, *heads, prompt=[63], n_steps=4, seed=1))


@pytest.mark.parametrize("n_prompt", [1, 5, 7, 9])
@pytest.mark.parametrize("name", METHODS)
def test_short_prompts(name, n_prompt):
    """Prompts below the observation window, and decode that grows past the budget."""
    assert_kept_as_brute_force(METHODS[name](6), steps_for(name, prompt=[n_prompt], n_steps=9, seed=2))


@pytest.mark.parametrize("budget", [5, 14, 16])
@pytest.mark.parametrize("name", METHODS)
def test_sliding_window_layers(name, budget):
    assert_kept_as_brute_force(METHODS[name](budget), steps_for(name, n_steps=18, seed=3), sliding_window=16)


def test_the_methods_differ():
    """The comparison above would say little if all methods kept the same keys."""
    kept = {}
    for name, make in METHODS.items():
        layers = layers_of(make(28), 3)
        kept[name] = [forward(layers, *states) for states in random_steps(prompt=[61], n_steps=0, n_layers=3)][-1]
    same = {"cab without graph"}, {"streaming_llm", "streaming_llm no sinks", "streaming_llm 9 sinks"}
    for one, other in combinations(sorted(set(kept).difference(*same)), 2):
        assert kept[one] != kept[other], (one, other)


@pytest.mark.parametrize("name", METHODS)
def test_equal_scores_keep_the_lower_position(name):
    """Keys that are all alike draw equal weights from every query."""
    zeros = [np.zeros((N_LAYERS.get(name, 1), 2, n, DIM), np.float32) for n in [16, 1, 1, 1]]
    steps = [(x + 1, x, x) for x in zeros]
    layers = layers_of(METHODS[name](8), len(zeros[0]))
    kept = [forward(layers, *states)[0][0] for states in steps]
    if name in ("tova", "key_norm", "key_diff"):
        assert kept[0] == [*range(8)]
    if name == "snapkv no pooling":  # the three observed queries see keys 0 to 13 alike
        assert kept[0] == [0, 1, 2, 3, 4, 13, 14, 15]
    else:
        assert_kept_as_brute_force(METHODS[name](8), steps)


def test_h2o_by_hand():
    """Four keys, weights written down: key 1 is looked at, key 0 has no more than causality gives it."""
    q = np.zeros((1, 1, 4, DIM), np.float32)
    k = np.zeros((1, 1, 4, DIM), np.float32)
    q[..., 0], k[0, 0, 1, 0] = 1, 4 * math.log(3)  # scale 0.5: key 1 weighs 9 against 1
    (layer,) = layers = layers_of(H2O(2))
    assert forward(layers, q, k, k) == [[[1, 3]]]
    expected = 9 / 10 + 9 / 11 + 9 / 12, 1 / 12
    assert layer.scores[0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def taken_down(monkeypatch) -> dict[int, tuple]:
    """Of each layer's last forward: its queries, keys and values [B, heads, n, D] and the scale of the logits."""
    update, attend, record, new = EvictingLayer.update, EvictingLayer.attend, {}, {}

    def recording_update(self, key_states, value_states, *rest):
        new[self.layer_index] = key_states, value_states
        return update(self, key_states, value_states, *rest)

    def recording_attend(self, module, operator, query, padding, **options):
        record[self.layer_index] = (query, *new[self.layer_index]), options["scale"]
        return attend(self, module, operator, query, padding, **options)

    monkeypatch.setattr(EvictingLayer, "update", recording_update)
    monkeypatch.setattr(EvictingLayer, "attend", recording_attend)
    return record


def rope_theta(config, index: int) -> float:
    rope = getattr(config, "rope_parameters", {"rope_theta": None})
    return rope["rope_theta"] if "rope_theta" in rope else rope[config.layer_types[index]]["rope_theta"]


IN_A_MODEL = ["streaming_llm", "h2o", "snapkv", "pyramidkv", "adakv", "key_norm", "key_diff", "expected_attention"]
IN_A_MODEL += ["tova", "cab", "cab redundancy", "cab median"]
ARCHITECTURES = [("llama", "cab"), ("gemma3", "cab"), ("gemma3", "eager_with_scores"), ("gpt2", "eager_with_scores")]


@pytest.mark.parametrize(
    ("architecture", "attention", "name"),
    [
        (*model, name)
        for model in ARCHITECTURES
        for name in IN_A_MODEL
        if (model[0], name) != ("gpt2", "expected_attention")  # GPT-2 has no rotary embedding
    ],
)
def test_in_a_model(name, architecture, attention, taken_down):
    """Row 1 is left-padded: its kept positions are those of the row alone, shifted. Some layers slide (Gemma 3)."""
    model, method = tiny_model_with_key_gains(architecture, attention), METHODS[name](0.4)
    padding, n_prompt = (0, 6), 36
    cache = EvictingCache(model.config, method)
    ids, mask = left_padded_distinct(*padding, n_tokens=n_prompt + 5)
    windows = [layer.sliding_window for layer in cache.layers]
    expected: dict = {}
    for start, stop in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, n_prompt + 5))]:
        feed(model, cache, ids[:, start:stop], mask[:, :stop])
        for index, layer in enumerate(cache.layers):
            states, scale = taken_down[index]
            for row in range(2):
                if start == 0:
                    expected[index, row] = BruteForceLayer(
                        method,
                        states[1].shape[1],
                        layer.sliding_window,
                        index=windows[:index].count(windows[index]),
                        n_layers=windows.count(windows[index]),
                        rope_theta=rope_theta(model.config, index),
                    )
                first = padding[row] if start == 0 else 0
                expected[index, row].forward(*(x[row, :, first:].double().numpy() for x in states), scale)
                kept = [[p - padding[row] for p in head if p >= 0] for head in layer.positions[row].tolist()]
                assert kept == expected[index, row].present, (start, index, row)
