"""Kept keys against brute force: every cut of every method, step by step through decode."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from transformers import MistralConfig

from cab_attention import CAB, H2O, TOVA, EvictingCache, SnapKV, StreamingLLM
from cab_attention.cache_layer import EvictingLayer
from cab_attention.kernels.flash_attention_accumulate import flash_attention_with_cumulative_scores
from tests.feeding import feed, left_padded, tiny_model_with_key_gains
from tests.methods.numpy_rules import BruteForceLayer

N_PROMPT, N_STEPS, DIM = 37, 7, 8
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
    "tova": TOVA,
    "cab": lambda b: CAB(b, block_size=4),
    "cab odd blocks": lambda b: CAB(b, block_size=3, local_ratio=0.1, bridge_ratio=0.6, importance_ratio=0.3),
    "cab redundancy": lambda b: CAB(b, block_size=4, bridge="redundancy", redundancy=1.0),
    "cab median": lambda b: CAB(b, bridge="median"),
    "cab without graph": lambda b: CAB(b, block_size=32),
}


def layer_of(method, sliding_window=None) -> EvictingLayer:
    config = MistralConfig(num_hidden_layers=1, sliding_window=sliding_window, attn_implementation="cab")
    return EvictingCache(config, method).layers[0]


def forward(layer: EvictingLayer, q, k, scale=0.5) -> list[list[int]]:
    """Feed one row of numpy queries [H, n, D] and keys [G, n, D]; the kept positions of each head."""
    q, k = (torch.tensor(x, dtype=torch.float32)[None] for x in (q, k))
    layer.update(k, k)
    options = {} if layer.sliding_window is None else {"sliding_window": layer.sliding_window}
    layer.attend(flash_attention_with_cumulative_scores, q, None, scale=scale, is_causal=True, **options)
    return layer.positions[0].tolist()


def random_steps(n_heads, n_kv_heads, n_prompt=N_PROMPT, n_steps=N_STEPS, seed=0):
    """The prompt, then single tokens: (q [H, n, D], k [G, n, D])."""
    random = np.random.default_rng(seed)
    for n in [n_prompt, *[1] * n_steps]:
        q, k = (random.normal(size=(heads, n, DIM)).astype(np.float32) for heads in (n_heads, n_kv_heads))
        yield 1.5 * q, k


def assert_kept_as_brute_force(method, steps, n_kv_heads, sliding_window=None) -> None:
    layer, brute_force = layer_of(method, sliding_window), BruteForceLayer(method, n_kv_heads, sliding_window)
    for step, (q, k) in enumerate(steps):
        brute_force.forward(q.astype(np.float64), k.astype(np.float64), scale=0.5)
        kept = [[p for p in head if p >= 0] for head in forward(layer, q, k)]
        assert kept == brute_force.present, f"after step {step}"


@pytest.mark.parametrize("budget", [1, 2, 3, 8, 17, 30, N_PROMPT - 1, N_PROMPT, N_PROMPT + 3, 0.01, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_prompt_and_decode(name, budget):
    assert_kept_as_brute_force(METHODS[name](budget), random_steps(4, 2), 2)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("name", METHODS)
def test_grouped_heads(name, heads):
    assert_kept_as_brute_force(METHODS[name](24), random_steps(*heads, n_prompt=63, seed=1), heads[1])


@pytest.mark.parametrize("n_prompt", [1, 2, 5, 7, 8, 9, 24])
@pytest.mark.parametrize("name", METHODS)
def test_short_prompts(name, n_prompt):
    """Prompts below the observation window, and decode that grows past the budget."""
    assert_kept_as_brute_force(METHODS[name](6), random_steps(4, 2, n_prompt, n_steps=10, seed=2), 2)


@pytest.mark.parametrize("budget", [5, 11, 15, 40])
@pytest.mark.parametrize("name", METHODS)
def test_sliding_window_layers(name, budget):
    assert_kept_as_brute_force(METHODS[name](budget), random_steps(4, 2, n_steps=20, seed=3), 2, sliding_window=16)


def test_the_methods_differ():
    """The comparison above would say little if all methods kept the same keys."""
    kept = {}
    for name, make in METHODS.items():
        layer = layer_of(make(28))
        kept[name] = [forward(layer, q, k) for q, k in random_steps(4, 2, 61)][-1]
    same = {"cab without graph"}, {"streaming_llm", "streaming_llm no sinks", "streaming_llm 9 sinks"}
    for one, other in combinations(sorted(set(kept).difference(*same)), 2):
        assert kept[one] != kept[other], (one, other)


@pytest.mark.parametrize("name", METHODS)
def test_equal_scores_keep_the_lower_position(name):
    """Keys that are all alike draw equal weights from every query."""
    steps = [(np.ones((2, n, DIM), np.float32), np.zeros((2, n, DIM), np.float32)) for n in [16, 1, 1, 1]]
    layer = layer_of(METHODS[name](8))
    kept = [forward(layer, q, k)[0] for q, k in steps]
    if name == "tova":
        assert kept == [[*range(8)]] * 4
    elif name == "snapkv no pooling":  # the three observed queries see keys 0 to 13 alike
        assert kept[0] == [0, 1, 2, 3, 4, 13, 14, 15]
    else:
        assert_kept_as_brute_force(METHODS[name](8), steps, 2)


def test_h2o_by_hand():
    """Four keys, weights written down: key 1 is looked at, key 0 has no more than causality gives it."""
    q = np.zeros((1, 4, DIM), np.float32)
    k = np.zeros((1, 4, DIM), np.float32)
    q[0, :, 0], k[0, 1, 0] = 1, 4 * math.log(3)  # scale 0.5: key 1 weighs 9 against 1
    layer = layer_of(H2O(2))
    assert forward(layer, q, k) == [[1, 3]]
    expected = 9 / 10 + 9 / 11 + 9 / 12, 1 / 12
    assert layer.scores[0, 0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def taken_down(monkeypatch) -> dict[int, tuple]:
    """Of each layer's last forward: the queries [B, H, n, D], the new keys [B, G, n, D] and attention's options."""
    update, attend, record, new_keys = EvictingLayer.update, EvictingLayer.attend, {}, {}

    def recording_update(self, key_states, *rest):
        new_keys[self.layer_index] = key_states
        return update(self, key_states, *rest)

    def recording_attend(self, operator, query, padding, **options):
        record[self.layer_index] = query, new_keys[self.layer_index], options
        return attend(self, operator, query, padding, **options)

    monkeypatch.setattr(EvictingLayer, "update", recording_update)
    monkeypatch.setattr(EvictingLayer, "attend", recording_attend)
    return record


@pytest.mark.parametrize("attention", ["cab", "eager_with_scores"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "snapkv", "tova", "cab", "cab redundancy", "cab median"])
def test_in_a_model(name, architecture, attention, taken_down):
    """Row 1 is left-padded: its kept positions are those of the row alone, shifted. Some layers slide (Gemma 3)."""
    model, method = tiny_model_with_key_gains(architecture, attention), METHODS[name](0.4)
    padding, n_prompt = (0, 6), 36
    cache = EvictingCache(model.config, method)
    ids, mask = left_padded(*padding, n_tokens=n_prompt + 5)
    expected: dict = {}
    for start, stop in [(0, n_prompt), *((i, i + 1) for i in range(n_prompt, n_prompt + 5))]:
        feed(model, cache, ids[:, start:stop], mask[:, :stop])
        for index, layer in enumerate(cache.layers):
            q, k, options = taken_down[index]
            for row in range(2):
                if start == 0:
                    expected[index, row] = BruteForceLayer(method, k.shape[1], layer.sliding_window)
                    q_row, k_row = (x[row, :, padding[row] :].double().numpy() for x in (q, k))
                else:
                    q_row, k_row = (x[row].double().numpy() for x in (q, k))
                expected[index, row].forward(q_row, k_row, options["scale"])
                kept = [[p - padding[row] for p in head if p >= 0] for head in layer.positions[row].tolist()]
                assert kept == expected[index, row].present, (start, index, row)
    assert all(len(head) <= n_prompt // 2 + 2 for layer in expected.values() for head in layer.present)
