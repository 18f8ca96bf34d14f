"""Rotating keys to other positions, against keys that the model computes there."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cohere2Config, DynamicCache, SmolLM3Config

from cab_attention.rotary import Rotary
from tests.tiny_models import SHARED, random_ids, tiny_model

FULL_FIRST = ["full_attention", "sliding_attention", "full_attention"]
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=128)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, long_factor=[2.0] * 8, short_factor=[1.0] * 8)
MODELS = {
    "llama": ("llama", {}),
    "llama linear": ("llama", {"rope_parameters": dict(rope_type="linear", rope_theta=1e4, factor=4.0)}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma3 sliding": ("gemma3", {}),
    "gemma3 full": ("gemma3", {"layer_types": FULL_FIRST}),
    "phi3": ("phi3", {}),
    "phi3 partial": (
        "phi3",
        {"rope_parameters": dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)},
    ),
}
N_TOKENS = 20  # fewer than the sliding windows: every key is kept


def first_rotary(model) -> Rotary:
    return Rotary(model.get_decoder().layers[0].self_attn)


@torch.no_grad()
def first_keys(model, ids: Tensor, positions: Tensor) -> Tensor:
    """The first layer's keys [B, G, N, D] of tokens at RoPE positions [B, N]: they depend on nothing else."""
    cache = DynamicCache(config=model.config)
    model(ids, position_ids=positions, past_key_values=cache)
    return cache.layers[0].keys


@pytest.mark.parametrize("name", MODELS)
def test_rotated_keys_are_those_at_the_other_positions(name):
    architecture, changes = MODELS[name]
    model, ids = tiny_model(architecture, "sdpa", **changes), random_ids(2, N_TOKENS)
    generator = torch.Generator().manual_seed(1)
    start, end = torch.randint(0, 60, (2, 2, N_TOKENS), generator=generator)
    before, after = first_keys(model, ids, start), first_keys(model, ids, end)
    assert (before - after).abs().max() > 0.1
    rotated = first_rotary(model).rotate(before, (end - start)[:, None])
    torch.testing.assert_close(rotated, after, atol=1e-5, rtol=0)


def test_gemma3_rotates_by_the_layers_own_parameters():
    """Later layers rotate otherwise than the first; moved as a whole, the text gives them the same hidden states."""
    model, ids = tiny_model("gemma3", "sdpa"), random_ids(1, N_TOKENS)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, start in zip(caches, (0, 37), strict=True):
            model(ids, position_ids=torch.arange(start, start + N_TOKENS)[None], past_key_values=cache)
    for layer, before, after in zip(model.get_decoder().layers, *(cache.layers for cache in caches), strict=True):
        rotated = Rotary(layer.self_attn).rotate(before.keys, torch.tensor(37))
        torch.testing.assert_close(rotated, after.keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama yarn", "gemma3 full", "phi3 partial"])
def test_every_head_and_key_by_its_own(name):
    architecture, changes = MODELS[name]
    rotary = first_rotary(tiny_model(architecture, **changes))
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 2, 7, 16, generator=generator)
    by = torch.randint(-50, 50, (3, 2, 7), generator=generator)
    rotated = rotary.rotate(x, by)
    for row, head, key in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(7)).tolist():
        alone = rotary.rotate(x[row, head, key][None, None, None], by[row, head, key])
        torch.testing.assert_close(rotated[row, head, key], alone[0, 0, 0])
    torch.testing.assert_close(rotary.rotate(rotated, -by), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotary.rotate(x, by.float()), rotated)
    assert torch.equal(rotary.rotate(x, torch.tensor(0)), x)


def test_half_precision_is_rounded_once():
    rotary = first_rotary(tiny_model("llama"))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 2, 50, 16, generator=generator).bfloat16()
    by = torch.arange(50)
    rotated = rotary.rotate(x, by)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotary.rotate(x.float(), by).bfloat16())


@pytest.mark.parametrize("name", ["llama", "llama yarn", "gemma3 sliding", "phi3 partial"])
def test_average_rotation_of_moments(name):
    """Against the average of rotation matrices, one for each position; rows start at positions of their own."""
    architecture, changes = MODELS[name]
    rotary = first_rotary(tiny_model(architecture, **changes))
    generator = torch.Generator().manual_seed(4)
    mean, root = torch.randn(2, 3, 16, generator=generator), torch.randn(2, 3, 16, 16, generator=generator)
    covariance, starts, n = root @ root.transpose(2, 3), torch.tensor([0, 21]), 13
    future_mean, future_covariance = rotary.rotate_moments(mean, covariance, starts, n)
    assert future_mean.dtype == future_covariance.dtype == torch.float32
    for row, start in enumerate(starts.tolist()):
        unit = torch.eye(16)[None, None]
        turned = [rotary.rotate(unit, torch.tensor(p))[0, 0].double().T for p in range(start, start + n)]
        average = sum(turned) / n
        torch.testing.assert_close(future_mean[row].double(), mean[row].double() @ average.T, atol=1e-5, rtol=0)
        expected = average @ covariance[row].double() @ average.T
        torch.testing.assert_close(future_covariance[row].double(), expected, atol=1e-4, rtol=1e-5)
    at_21 = rotary.rotate_moments(mean, covariance, 21, n)
    assert torch.equal(at_21[0][1], future_mean[1]) and torch.equal(at_21[1][1], future_covariance[1])


def attention_of(config) -> nn.Module:
    """The last layer's."""
    return AutoModelForCausalLM.from_config(config).get_decoder().layers[-1].self_attn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("gpt2").transformer.h[0].attn, r"apply_rotary_pos_emb\(q, k, cos, sin\)"),
        (lambda: tiny_model("llama", rope_parameters=DYNAMIC).model.layers[0].self_attn, "'dynamic'.*default, linear"),
        (lambda: tiny_model("phi3", rope_parameters=LONGROPE).model.layers[0].self_attn, "'longrope'.*default, linear"),
        (lambda: attention_of(SmolLM3Config(**SHARED)), "every layer"),
        (lambda: attention_of(Cohere2Config(**SHARED)), "every layer"),
    ],
    ids=["gpt2", "dynamic", "longrope", "smollm3", "cohere2"],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as error:
        Rotary(make())
    assert "\n" not in str(error.value)
