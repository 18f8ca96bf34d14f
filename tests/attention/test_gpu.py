from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cab_attention import (
    H2O,
    AttentionImplementation,
    EvictingCache,
    flash_attention_with_cumulative_scores,
    get_all_cumulative_scores,
    get_available_implementations,
    replace_attention_with_flash,
)
from cab_attention.kernels.reference import attention_reference
from tests.all_methods import FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.feeding import left_padded
from tests.tiny_models import random_ids, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cuda()


def options_for(name: str, n_batch: int, n_kv_heads: int, n_k: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    visible = torch.rand(n_batch, n_kv_heads, n_k, generator=generator) < 0.7
    positions = torch.randint(1, 4, visible.shape, generator=generator).cumsum(-1)
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask_2d": {"is_causal": True, "key_mask": visible[:, 0].cuda()},
        "mask_3d": {"key_mask": visible.cuda()},
        "window": {"is_causal": True, "sliding_window": 37},
        "window_cut": {"is_causal": True, "sliding_window": 90, "key_positions": positions.cuda()},
        "softcap": {"is_causal": True, "softcap": 2.0, "score_queries": 5},
    }[name]


@pytest.mark.parametrize("name", ["plain", "causal", "mask_2d", "mask_3d", "window", "window_cut", "softcap"])
@pytest.mark.parametrize(("n_q", "n_k"), [(111, 111), (777, 777), (1, 333), (63, 777), (63, 7)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (4, 1, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator(dtype: torch.dtype, n_heads: int, n_kv_heads: int, dim: int, n_q: int, n_k: int, name: str) -> None:
    q = (2 * on_gpu(2, n_heads, n_q, dim, seed=0)).to(dtype)
    k, v = (on_gpu(2, n_kv_heads, n_k, dim, seed=seed).to(dtype) for seed in (1, 2))
    options = options_for(name, 2, n_kv_heads, n_k)
    output, scores = flash_attention_with_cumulative_scores(q, k, v, **options)
    exact, exact_scores = attention_reference(q.double(), k.double(), v.double(), **options)
    assert output.is_cuda and scores.is_cuda and output.dtype == dtype and scores.dtype == torch.float32
    # What plain torch loses in this dtype: the reference rounded at the input, the weights and the output.
    rounding = torch.finfo(dtype).eps
    assert (output.double() - exact).abs().max() <= max(2e-5, 2 * rounding * exact.abs().max())
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-7)
    assert exact_scores.unique().numel() > n_k / 2
    again = flash_attention_with_cumulative_scores(q, k, v, **options)
    assert torch.equal(again[0], output) and torch.equal(again[1], scores)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
@pytest.mark.parametrize("attention", ["cab", "eager_with_scores"])
@pytest.mark.parametrize("n_pad", [0, 9])
def test_eviction_keeps_what_the_cpu_keeps(architecture: str, attention: str, n_pad: int) -> None:
    ids = random_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :n_pad] = 0
    caches, texts = [], []
    for device in ("cpu", "cuda"):
        model = tiny_model(architecture, attention).to(device)
        caches.append(EvictingCache(model.config, H2O(16)))
        inputs = {"attention_mask": mask.to(device), "past_key_values": caches[-1]}
        texts.append(model.generate(ids.to(device), max_new_tokens=8, do_sample=False, **inputs).cpu())
    assert torch.equal(*texts)
    for cpu, gpu in zip(*(cache.layers for cache in caches), strict=True):
        assert gpu.keys.is_cuda and gpu.keys.shape[2] == 16 and (cpu.positions[0] >= n_pad).all()
        assert torch.equal(gpu.positions.cpu(), cpu.positions)
        torch.testing.assert_close(gpu.scores.cpu(), cpu.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS, *FULL_ATTENTION_VARIANTS])
def test_every_method_keeps_what_it_keeps_on_the_cpu(name: str) -> None:
    method = (METHODS | VARIANTS | FULL_ATTENTION_VARIANTS)[name](16)
    ids, mask = left_padded(0, 9, n_tokens=60)
    kept, texts, sizes = [], [], []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama").to(device)
        cache = EvictingCache(model.config, method)
        inputs = {"attention_mask": mask.to(device), "past_key_values": cache}
        texts.append(model.generate(ids.to(device), max_new_tokens=8, do_sample=False, **inputs).cpu())
        kept.append([layer.positions.cpu() for layer in cache.layers])
        sizes.append(cache.cache_bytes)
    assert torch.equal(*texts) and sizes[0] == sizes[1]
    assert all(torch.equal(gpu, cpu) for cpu, gpu in zip(*kept, strict=True))


def test_replaced_modules_record_what_the_cpu_records() -> None:
    recorded = []
    for device in ("cpu", "cuda"):
        model = replace_attention_with_flash(tiny_model("llama", "sdpa").to(device))
        model.generate(random_ids(2, 60).to(device), max_new_tokens=8, do_sample=False)
        recorded.append(get_all_cumulative_scores(model))
    assert len(recorded[0]) == 3 and recorded[0].keys() == recorded[1].keys()
    for name, scores in recorded[0].items():
        torch.testing.assert_close(recorded[1][name].cpu(), scores, rtol=1e-4, atol=1e-4)


def test_available() -> None:
    here = get_available_implementations()
    assert {AttentionImplementation.EAGER, AttentionImplementation.SDPA, AttentionImplementation.CAB} <= set(here)
