"""The eviction oracle: a full cache and a mask that hides exactly the evicted keys must give the same logits."""

from itertools import product

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Gemma2Config

from cab_attention import EvictingCache
from tests.all_methods import EVICTING, METHODS
from tests.feeding import feed, left_padded
from tests.tiny_models import ARCHITECTURES, tiny_model

hidden: dict[int, torch.Tensor] = {}  # layer -> bool [B, G, tokens seen], the keys that the next forward may not see


def oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Plain attention in float64 over all keys, masked by causality, the sliding window and `hidden`."""
    n_batch, n_heads, n_q, dim = query.shape
    n_kv_heads, n_k = key.shape[1:3]
    key, value = (x.double().repeat_interleave(n_heads // n_kv_heads, 1) for x in (key, value))
    logits = query.double() @ key.mT * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distance = torch.arange(n_k - n_q, n_k)[:, None] - torch.arange(n_k)
    visible = (distance >= 0) & (distance < (kwargs.get("sliding_window") or n_k))
    visible = visible.expand(n_batch, n_heads, n_q, n_k).clone()
    not_now = hidden[module.layer_idx].expand(-1, n_kv_heads, -1)
    visible &= ~not_now.repeat_interleave(n_heads // n_kv_heads, 1)[:, :, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("oracle", oracle_attention)
AttentionMaskInterface.register("oracle", lambda *args, **kwargs: None)


def hide_what_is_not_in(cache: EvictingCache, mask: torch.Tensor) -> None:
    """Hide the evicted keys, and the padding among the tokens that come next."""
    for index, layer in enumerate(cache.layers):
        visible = mask.bool()[:, None].repeat(1, layer.positions.shape[1], 1)
        visible[..., : layer.seen] = False
        for row, head in product(*map(range, layer.positions.shape[:2])):
            visible[row, head, [p for p in layer.positions[row, head].tolist() if p >= 0]] = True
        hidden[index] = ~visible


def hide_padding(cache: EvictingCache, mask: torch.Tensor) -> None:
    hidden.update(dict.fromkeys(range(len(cache.layers)), ~mask.bool()[:, None]))


def largest_differences(architecture, method, attention, padding, pieces, **cache_options):
    """Feed `pieces` tokens one after another to three runs: evicting, oracle, full cache.

    Returns the largest logit differences evicting - oracle and evicting - full, and the cache.
    """
    model, oracle = (tiny_model(architecture, name) for name in (attention, "oracle"))
    ids, mask = left_padded(*padding, n_tokens=sum(pieces))
    cache, masked, full = EvictingCache(model.config, method, **cache_options), DynamicCache(), DynamicCache()
    from_oracle = from_full = 0.0
    for number, piece in enumerate(ids.split(pieces, dim=1)):
        so_far = mask[:, : cache.get_seq_length() + piece.shape[1]]
        is_real = so_far[:, -piece.shape[1] :].bool()
        hide_padding(cache, so_far)
        uncut = feed(oracle, full, piece, so_far)[is_real]
        if number > 0:
            hide_what_is_not_in(cache, so_far)
        expected = feed(oracle, masked, piece, so_far)[is_real]
        logits = feed(model, cache, piece, so_far)[is_real]
        from_oracle = max(from_oracle, (logits - expected).abs().max().item())
        from_full = max(from_full, (logits - uncut).abs().max().item())
    return from_oracle, from_full, cache


@pytest.mark.parametrize(
    ("architecture", "method"),
    # GPT-2 has no rotary embedding, by which expected attention turns queries back.
    [pair for pair in product(ARCHITECTURES, EVICTING) if pair != ("gpt2", "expected_attention")],
)
def test_evicting_is_hiding_the_evicted_keys(architecture, method):
    from_oracle, from_full, cache = largest_differences(
        architecture, METHODS[method](9), "cab", padding=[0, 5], pieces=[41, *[1] * 6]
    )
    assert from_oracle < 1e-4
    assert from_full > 1e-2  # what was hidden mattered
    assert all(layer.keys.shape[2] < 41 for layer in cache.layers)


@pytest.mark.parametrize("method", ["h2o", "snapkv", "adakv", "tova", "cab", "random"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_same_on_the_models_own_eager_attention(architecture, method):
    from_oracle, from_full, _ = largest_differences(
        architecture, METHODS[method](0.3), "eager_with_scores", padding=[3, 0], pieces=[31, *[1] * 4]
    )
    assert from_oracle < 1e-4
    assert from_full > 1e-2


@pytest.mark.parametrize("method", ["h2o", "snapkv", "adakv", "tova", "cab"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_compressed_context_with_a_question_after_it(architecture, method):
    """The question is several tokens on top of what was kept of the context."""
    from_oracle, from_full, _ = largest_differences(
        architecture,
        METHODS[method](8),
        "cab",
        padding=[0, 4],
        pieces=[33, 7, *[1] * 4],
        prompt_tokens=40,
        compress_at=33,
    )
    assert from_oracle < 1e-4
    assert from_full > 1e-2


@pytest.mark.parametrize("method", ["h2o", "snapkv", "adakv", "tova", "cab_median", "random"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_prompt_in_chunks(architecture, method):
    from_oracle, from_full, _ = largest_differences(
        architecture, METHODS[method](8), "cab", padding=[0, 9], pieces=[7] * 5 + [2] + [1] * 4, prompt_tokens=37
    )
    assert from_oracle < 1e-4
    assert from_full > 1e-2


def test_the_oracle_notices_one_wrong_key(monkeypatch):
    """One evicted key left visible moves the logits far more than the tolerance."""
    honest = hide_what_is_not_in

    def forgetful(cache, mask):
        honest(cache, mask)
        for index, old in hidden.items():
            first = old.int().argmax(-1, keepdim=True)
            hidden[index] = old.scatter(2, first, False)

    monkeypatch.setitem(globals(), "hide_what_is_not_in", forgetful)
    from_oracle, _, _ = largest_differences("llama", METHODS["h2o"](9), "cab", padding=[0], pieces=[41, 1, 1])
    assert from_oracle > 1e-3


def test_softcapped_attention(monkeypatch):
    """Gemma 2 passes its cap on logits to the attention function, and mixes sliding and full layers."""
    own = {"head_dim": 16, "sliding_window": 24, "attn_logit_softcapping": 2.0}
    monkeypatch.setitem(ARCHITECTURES, "gemma2", (Gemma2Config, own))
    from_oracle, from_full, _ = largest_differences(
        "gemma2", METHODS["h2o"](9), "cab", padding=[0, 5], pieces=[41, *[1] * 4]
    )
    assert from_oracle < 1e-4
    assert from_full > 1e-2
