"""The Triton kernels themselves on a CPU, through Triton's interpreter, on small shapes."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run compiled where there is a GPU (test_gpu.py)", allow_module_level=True)

from cab_attention.kernels.prefill import prefill_attention
from cab_attention.kernels.reference import attention_reference

N_K, WINDOW = 41, 9


def options_for(name: str) -> dict:
    generator = torch.Generator().manual_seed(1)
    some = torch.rand(2, N_K, generator=generator) > 0.3
    heads = torch.rand(2, 2, N_K, generator=generator) > 0.3
    cut = (torch.rand(2, 2, 3 * N_K, generator=generator).argsort(-1)[..., :N_K]).sort(-1).values
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "mask": {"is_causal": True, "key_mask": some},
        "head_mask": {"key_mask": heads},
        "nothing_seen": {"key_mask": torch.zeros_like(some)},
        "window": {"is_causal": True, "sliding_window": WINDOW},
        "window_cut": {"is_causal": True, "sliding_window": 3 * WINDOW, "key_positions": cut, "key_mask": heads},
        "softcap": {"is_causal": True, "softcap": 2.0},
        "last": {"is_causal": True, "score_queries": 5},
        "none": {"is_causal": True, "score_queries": 0},
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n_q", [1, 23, N_K, 57])
@pytest.mark.parametrize(
    "name",
    ["plain", "causal", "mask", "head_mask", "nothing_seen", "window", "window_cut", "softcap", "last", "none"],
)
def test_against_the_definition(name: str, n_q: int, dtype: torch.dtype):
    generator, options = torch.Generator().manual_seed(0), options_for(name)
    if name == "window_cut" and n_q > N_K:
        pytest.skip("a cut cache holds at least the new keys")
    q = (2 * torch.randn(2, n_q, 4, 24, generator=generator)).to(dtype).transpose(1, 2)  # as transformers lays it out
    k, v = (torch.randn(2, N_K, 2, 24, generator=generator).to(dtype).transpose(1, 2) for _ in range(2))
    exact, exact_scores = attention_reference(q.double(), k.double(), v.double(), **options)
    defaults = dict.fromkeys(("key_mask", "key_positions", "sliding_window", "softcap")) | {"is_causal": False}
    counted = {"score_queries": min(n_q, options.get("score_queries", n_q))}
    output, scores = prefill_attention(q, k, v, 24**-0.5, **(defaults | options | counted))
    tolerance = 2e-3 if dtype == torch.float16 else 2e-6
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-7)
