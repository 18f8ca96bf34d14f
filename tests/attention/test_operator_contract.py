from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cab_attention import flash_attention_with_cumulative_scores as attend
from cab_attention.kernels import blockwise
from cab_attention.kernels.reference import attention_reference

B, H, G, Q, K, D = 2, 4, 2, 5, 7, 8


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def good() -> dict[str, Any]:
    return {"q": randn(B, H, Q, D), "k": randn(B, G, K, D, seed=1), "v": randn(B, G, K, D, seed=2)}


@pytest.mark.parametrize("n_earlier", [0, 1, 6, 7])
@pytest.mark.parametrize(("per_kv_head", "heads"), [(False, H), (True, G)])
def test_earlier_scores_are_added_and_left_alone(per_kv_head: bool, heads: int, n_earlier: int) -> None:
    earlier = randn(B, heads, n_earlier, seed=3).abs()
    before = earlier.clone()
    _, new = attend(**good(), is_causal=True, per_kv_head=per_kv_head)
    _, summed = attend(**good(), cumulative_scores=earlier, is_causal=True, per_kv_head=per_kv_head)
    assert torch.equal(earlier, before)
    torch.testing.assert_close(summed[:, :, :n_earlier] - earlier, new[:, :, :n_earlier], rtol=1e-5, atol=1e-6)
    assert torch.equal(summed[:, :, n_earlier:], new[:, :, n_earlier:]) and new.unique().numel() == new.numel()
    if n_earlier == K:
        _, same = attend(**good(), cumulative_scores=earlier, score_queries=0, per_kv_head=per_kv_head)
        assert torch.equal(same, earlier) and same.data_ptr() != earlier.data_ptr()


def test_inputs_are_not_modified() -> None:
    given = good() | {"key_mask": torch.ones(B, G, K, dtype=torch.bool), "is_causal": True, "sliding_window": 3}
    given["key_positions"] = torch.arange(K).expand(B, G, K).contiguous()
    copies = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    attend(**given, softcap=1.0)
    assert all(torch.equal(given[name], copy) for name, copy in copies.items())


def test_causal_is_aligned_bottom_right() -> None:
    """The last query sees all keys: decode equals the last row of the prefill, and a longer Q sees nothing at first."""
    q, k, v = good().values()
    last, _ = attend(q[:, :, -1:], k, v, is_causal=True)
    full, _ = attend(q, k, v)
    torch.testing.assert_close(last, full[:, :, -1:])
    output, scores = attend(randn(B, H, K + 3, D), k, v, is_causal=True)
    assert torch.equal(output[:, :, :3], torch.zeros(B, H, 3, D)) and (output[:, :, 3:] != 0).all()
    torch.testing.assert_close(scores.sum(-1), torch.full((B, H), float(K)))


def test_window_compares_positions_on_a_cut_cache() -> None:
    """Attention over the kept keys equals attention over all keys with the dropped ones hidden."""
    n, window = 40, 9
    q, k, v = randn(1, 2, 4, D), randn(1, 1, n, D, seed=1), randn(1, 1, n, D, seed=2)
    keep = torch.ones(n, dtype=torch.bool)
    keep[[3, 28, 30, 31, 34]] = False
    full, full_scores = attend(q, k, v, is_causal=True, sliding_window=window, key_mask=keep[None])
    positions = torch.arange(n)[keep][None, None]
    cut, scores = attend(
        q, k[:, :, keep], v[:, :, keep], is_causal=True, sliding_window=window, key_positions=positions
    )
    torch.testing.assert_close(cut, full)
    torch.testing.assert_close(scores, full_scores[..., keep])
    by_index, _ = attend(q, k[:, :, keep], v[:, :, keep], is_causal=True, sliding_window=window)
    assert (by_index - full).abs().max() > 0.01
    no_window, _ = attend(q, k[:, :, keep], v[:, :, keep], is_causal=True, key_positions=positions)
    assert torch.equal(no_window, attend(q, k[:, :, keep], v[:, :, keep], is_causal=True)[0])


def test_no_gradient_but_a_clear_refusal() -> None:
    given = good()
    output, scores = attend(**given | {"q": given["q"].requires_grad_()}, cumulative_scores=randn(B, H, 3))
    assert not scores.requires_grad
    with pytest.raises(RuntimeError, match="backward"):
        output.sum().backward()
    assert given["q"].grad is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    expected = attend(**good(), is_causal=True)
    with mode():
        got = attend(**good(), is_causal=True)
        summed = attend(**good(), cumulative_scores=got[1], is_causal=True)[1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.testing.assert_close(summed, 2 * expected[1])


def test_autocast_does_not_touch_the_sums() -> None:
    expected = attend(**good(), is_causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(**good(), is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_empty_batch() -> None:
    output, scores = attend(torch.zeros(0, H, Q, D), torch.zeros(0, G, K, D), torch.zeros(0, G, K, D))
    assert output.shape == (0, H, Q, D) and scores.shape == (0, H, K)


def test_deterministic() -> None:
    first, second = attend(**good(), is_causal=True), attend(**good(), is_causal=True)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


BAD: dict[str, dict[str, Any]] = {
    "q of 3 dimensions": {"q": randn(H, Q, D)},
    "k of 5 dimensions": {"k": randn(1, B, G, K, D)},
    "k and v of other lengths": {"v": randn(B, G, K + 1, D)},
    "k and v of other heads": {"v": randn(B, G + 2, K, D)},
    "value head dim": {"v": randn(B, G, K, D + 8)},
    "batch": {"q": randn(B + 1, H, Q, D)},
    "head dim": {"q": randn(B, H, Q, D + 8)},
    "heads not a multiple": {"q": randn(B, 3, Q, D)},
    "fewer query heads than KV heads": {"q": randn(B, 1, Q, D)},
    "no KV heads": {"k": randn(B, 0, K, D), "v": randn(B, 0, K, D)},
    "dtypes differ": {"q": randn(B, H, Q, D, dtype=torch.bfloat16)},
    "integers": {name: torch.ones(B, H, Q, D, dtype=torch.int64) for name in "qkv"},
    "devices differ": {"q": torch.empty(B, H, Q, D, device="meta")},
    "key_mask dtype": {"key_mask": torch.ones(B, K)},
    "key_mask of the queries": {"key_mask": torch.ones(B, Q, dtype=torch.bool)},
    "key_mask of the query heads": {"key_mask": torch.ones(B, H, K, dtype=torch.bool)},
    "key_mask 4D": {"key_mask": torch.ones(B, 1, Q, K, dtype=torch.bool)},
    "key_positions dtype": {"key_positions": torch.ones(B, G, K, dtype=torch.int32)},
    "key_positions shape": {"key_positions": torch.ones(B, K, dtype=torch.int64)},
    "sliding_window 0": {"sliding_window": 0, "is_causal": True},
    "sliding_window not causal": {"sliding_window": 4},
    "softcap 0": {"softcap": 0.0},
    "softcap negative": {"softcap": -1.0},
    "softcap infinite": {"softcap": float("inf")},
    "score_queries negative": {"score_queries": -1},
    "score_step 0": {"score_step": 0},
    "score_step negative": {"score_step": -2},
    "score_step no integer": {"score_step": 1.5},
    "score_step None": {"score_step": None},
    "score_step a string": {"score_step": "2"},
    "cumulative_scores dtype": {"cumulative_scores": torch.zeros(B, H, K, dtype=torch.float64)},
    "cumulative_scores longer": {"cumulative_scores": torch.zeros(B, H, K + 1)},
    "cumulative_scores heads": {"cumulative_scores": torch.zeros(B, G, K)},
    "cumulative_scores KV heads": {"cumulative_scores": torch.zeros(B, H, K), "per_kv_head": True},
    "cumulative_scores batch": {"cumulative_scores": torch.zeros(1, H, K)},
    "cumulative_scores 2D": {"cumulative_scores": torch.zeros(H, K)},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"got|must") as error:
        attend(**good() | BAD[name])
    assert len(str(error.value)) > 20


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that any operation inside made or returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_block_times_keys(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, block = 2048, 2**16
    monkeypatch.setitem(blockwise.MAX_LOGITS, "cpu", block)
    q, k, v = randn(1, 4, n, 16), randn(1, 2, n, 16, seed=1), randn(1, 2, n, 16, seed=2)
    options: dict[str, Any] = {"is_causal": True}
    if masked:
        options |= {"key_mask": randn(1, 2, n) > -1, "key_positions": 2 * torch.arange(n).expand(1, 2, n)}
        options |= {"sliding_window": 999, "softcap": 3.0}
    with LargestTensor() as ours:
        output, scores = attend(q, k, v, torch.zeros(1, 4, n), **options)
    assert n * 16 <= ours.elements <= max(block, q.numel())
    with LargestTensor() as quadratic:
        exact, exact_scores = attention_reference(q, k, v, **options)
    assert quadratic.elements >= 4 * n * n  # what the count finds where the matrix is built
    torch.testing.assert_close(output, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, exact_scores, rtol=1e-4, atol=1e-5)
