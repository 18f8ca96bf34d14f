"""`positions="compacted"`: the kept key of rank i among K stands at RoPE position seen - K + i."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from cab_attention import CAB, H2O, TOVA, AdaKV, EvictingCache, ExpectedAttention, KeyDiff, Random, SnapKV, StreamingLLM
from tests.feeding import feed, left_padded
from tests.methods.bare_layers import N_PROMPT, assert_kept_as_brute_force, random_steps
from tests.methods.numpy_rules import rope
from tests.tiny_models import random_ids, tiny_model

METHODS = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": TOVA,
    "cab": lambda b, **o: CAB(b, block_size=4, **o),
    "snapkv": lambda b, **o: SnapKV(b, window=8, **o),
    "adakv": lambda b, **o: AdaKV(b, window=8, **o),
    "h2o of the model": lambda b, **o: H2O(b, granularity="model", evict_every=3, **o),
    "h2o by chunks": lambda b, **o: H2O(b, evict_in_prefill="chunk", **o),
    "key_diff by chunks": lambda b, **o: KeyDiff(b, evict_in_prefill="chunk", **o),
    "expected_attention by chunks": lambda b, **o: ExpectedAttention(b, evict_in_prefill="chunk", **o),
}


def make(name: str, budget: int):
    return METHODS[name](budget, positions="compacted")


@pytest.mark.parametrize("budget", [2, 20])
@pytest.mark.parametrize("name", METHODS)
def test_kept_as_brute_force(name, budget):
    """Scores and keys are those that attention sees: what is kept depends on where the keys stand."""
    steps = random_steps(n_layers=2, prompt=[13, 1, 9, 14] if "chunks" in name else [N_PROMPT], n_steps=8)
    assert_kept_as_brute_force(make(name, budget), steps, prompt_tokens=N_PROMPT)


plain_keys: dict[int, list[torch.Tensor]] = {}  # layer -> keys [B, n, G * D] before RoPE, forward by forward
visible: dict[int, list[list[list[int]]]] = {}  # layer -> row -> head -> columns that the next forward sees
padding: list[int] = []  # of each row


def oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Plain attention in float64 over the visible keys, which get their places from their ranks."""
    n_heads, n_new, group = key.shape[1], query.shape[2], query.shape[1] // key.shape[1]
    keys = torch.cat(plain_keys[module.layer_idx], 1).unflatten(-1, (n_heads, -1)).transpose(1, 2).double().numpy()
    query, value, seen = query.double().numpy(), value.double().numpy(), key.shape[2]
    output = np.zeros_like(query)
    for row in range(len(query)):
        for head in range(query.shape[1]):
            columns = visible[module.layer_idx][row][head // group]
            places = np.arange(seen - len(columns), seen) - padding[row]
            logits = query[row, head] @ rope(keys[row, head // group, columns], places).T * scaling
            hidden = np.array(columns) > np.arange(seen - n_new, seen)[:, None]
            weights = np.exp(np.where(hidden, -np.inf, logits - logits.max()))
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            output[row, head] = weights @ value[row, head // group, columns]
    return torch.tensor(output, dtype=torch.float32).transpose(1, 2).contiguous(), None


AttentionInterface.register("compacting_oracle", oracle_attention)
AttentionMaskInterface.register("compacting_oracle", lambda *args, **kwargs: None)


def what_the_next_forward_sees(cache, mask) -> None:
    """What the cache holds, and of the tokens that come next all but padding."""
    for index, layer in enumerate(cache.layers):
        held = layer.positions.tolist() if layer.seen else [[[]] * 2] * len(mask)
        new = [[p for p in range(layer.seen, mask.shape[1]) if row[p]] for row in mask.tolist()]
        visible[index] = [
            [[p for p in head if p >= 0] + new[row] for head in of_row] for row, of_row in enumerate(held)
        ]


@pytest.mark.parametrize(("attention", "compress_at"), [("cab", None), ("cab", 26), ("eager_with_scores", None)])
@pytest.mark.parametrize("name", ["streaming_llm", "h2o", "tova", "cab", "adakv", "h2o of the model", "h2o by chunks"])
def test_logits_are_those_of_attention_over_keys_rotated_anew(name, attention, compress_at):
    """Row 1 is left-padded. At original positions the logits are others."""
    padding[:] = [0, 6]
    model, oracle = tiny_model("llama", attention), tiny_model("llama", "compacting_oracle")
    for index, layer in enumerate(oracle.model.layers):
        plain_keys[index] = []
        layer.self_attn.k_proj.register_forward_hook(lambda *of, held=plain_keys[index]: held.append(of[2]))
    ids, mask = left_padded(*padding, n_tokens=41)
    cache = EvictingCache(model.config, make(name, 9), prompt_tokens=33, compress_at=compress_at)
    unmoved = EvictingCache(model.config, METHODS[name](9), prompt_tokens=33, compress_at=compress_at)
    masked, differences, moved = DynamicCache(), [], []
    of_prompt = [13, 26, 33] if "chunks" in name else [26, 33] if compress_at else [33]
    stops = [*of_prompt, *range(34, 42)]
    for start, stop in zip([0, *stops], stops, strict=False):
        what_the_next_forward_sees(cache, mask[:, :stop])
        piece, so_far = ids[:, start:stop], mask[:, :stop]
        is_real = so_far[:, start:].bool()
        expected = feed(oracle, masked, piece, so_far)[is_real]
        logits = feed(model, cache, piece, so_far)[is_real]
        differences.append((logits - expected).abs().max())
        moved.append((feed(model, unmoved, piece, so_far)[is_real] - logits).abs().max())
    assert max(differences) < 1e-4
    assert moved[0] == 0 and max(moved) > 1e-2


def test_streaming_llm_is_attention_over_the_tokens_that_are_left():
    """With one layer keys hang on their own token alone: a short text of the kept tokens gives the same logits."""
    model, ids = tiny_model("llama", num_hidden_layers=1), random_ids(1, 60)
    cache = EvictingCache(model.config, StreamingLLM(12, positions="compacted"))
    feed(model, cache, ids[:, :50])
    for step in range(50, 60):
        logits = feed(model, cache, ids[:, step : step + 1])[:, -1]
        left = [*range(4), *range(step - 8, step + 1)]
        short = tiny_model("llama", "sdpa", num_hidden_layers=1)(ids[:, left]).logits[:, -1]
        assert (logits - short).abs().max() < 1e-4


@pytest.mark.parametrize("method", [Random, H2O])
def test_without_an_eviction_nothing_moves(method):
    model, ids = tiny_model("llama"), random_ids(2, 40)
    caches = [EvictingCache(model.config, method(40, positions=where)) for where in ("original", "compacted")]
    for start, stop in [(0, 37), (37, 38), (38, 39)]:
        one, other = (feed(model, cache, ids[:, start:stop]) for cache in caches)
        assert torch.equal(one, other)


def test_stored_keys_stay_as_they_came():
    """However often they move: turned anew from there, they are rounded once."""
    model, ids = tiny_model("llama"), random_ids(1, 60)
    cache = EvictingCache(model.config, StreamingLLM(9, positions="compacted"))
    feed(model, cache, ids[:, :40])
    sinks = [layer.keys[:, :, :4].clone() for layer in cache.layers]
    for step in range(40, 60):
        feed(model, cache, ids[:, step : step + 1])
    for layer, held in zip(cache.layers, sinks, strict=True):
        assert torch.equal(layer.keys[:, :, :4], held)
        assert layer.positions[0, 0].tolist() == [0, 1, 2, 3, 55, 56, 57, 58, 59]


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_sliding_layers_are_refused(architecture):
    with pytest.raises(ValueError, match="positions='compacted' needs full attention in every layer"):
        EvictingCache(tiny_model(architecture).config, H2O(9, positions="compacted"))


def test_a_model_without_rotations_is_refused():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="rotating keys needs apply_rotary_pos_emb"):
        feed(model, EvictingCache(model.config, H2O(9, positions="compacted")), random_ids(1, 20))


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="positions='moved', allowed is 'original' or 'compacted'"):
        H2O(9, positions="moved")
