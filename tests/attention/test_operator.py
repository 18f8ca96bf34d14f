import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from cab_attention import flash_attention_with_cumulative_scores as attend
from cab_attention.kernels import blockwise
from cab_attention.kernels.reference import attention_reference
from cab_attention.transformers_attention import _eager_operator
from tests.tiny_models import tiny_model

HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "sliding_window": 5},
    "window_1": {"is_causal": True, "sliding_window": 1},
    "window_cut": {"is_causal": True, "sliding_window": 40, "key_positions": True},
    "mask_2d": {"key_mask": 2},
    "mask_3d": {"is_causal": True, "key_mask": 3},
    "all": {"is_causal": True, "sliding_window": 60, "key_positions": True, "key_mask": 3, "softcap": 2.0}
    | {"score_queries": 3, "scale": 0.3},
    "softcap": {"softcap": 1.5, "is_causal": True},
    "scale": {"scale": 0.1},
    "score_0": {"score_queries": 0},
    "score_1": {"score_queries": 1, "is_causal": True},
    "score_5": {"score_queries": 5, "is_causal": True},
    "score_many": {"score_queries": 1000, "is_causal": True},
    "step_2": {"score_step": 2, "is_causal": True},
    "step_7": {"score_step": 7},
    "step_3_of_5": {"score_step": 3, "score_queries": 5, "is_causal": True},
    "step_many": {"score_step": 1000, "score_queries": 4, "is_causal": True},
    "step_of_none": {"score_step": 2, "score_queries": 0},
    "all_step": {"is_causal": True, "sliding_window": 60, "key_positions": True, "key_mask": 3, "softcap": 2.0}
    | {"score_queries": 50, "score_step": 4, "scale": 0.3},
}


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setitem(blockwise.MAX_LOGITS, "cpu", 4000)


def inputs(n_q: int, n_k: int, heads: str = "gqa", dim: int = 32, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of a batch of two; attention is sharp enough that no two keys score alike."""
    generator = torch.Generator().manual_seed(n_q * 1000 + n_k)
    n_heads, n_kv_heads = HEADS[heads]
    shapes = (2, n_heads, n_q, dim), (2, n_kv_heads, n_k, dim), (2, n_kv_heads, n_k, dim)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [(2 * q).to(dtype), k.to(dtype), v.to(dtype)]


def options_for(name: str, k: Tensor) -> dict[str, Any]:
    """OPTIONS[name] with masks and positions made for k: a third of the keys hidden, gaps of 0 to 3 between keys."""
    options, generator = dict(OPTIONS[name]), torch.Generator().manual_seed(7)
    if "key_mask" in options:
        shape = k.shape[:3] if options["key_mask"] == 3 else (k.shape[0], k.shape[2])
        options["key_mask"] = torch.rand(shape, generator=generator) < 0.67
    if "key_positions" in options:
        options["key_positions"] = torch.randint(1, 5, k.shape[:3], generator=generator).cumsum(-1) - 1
    return options


def counted_rows(n_q: int, score_queries: int | None = None, score_step: int = 1) -> list[int]:
    first = 0 if score_queries is None else n_q - score_queries
    return [row for row in range(n_q) if row >= first and (n_q - 1 - row) % score_step == 0]


def by_loops(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """Output and scores, one query and one key at a time in Python floats."""
    (n_batch, n_heads, n_q, dim), (_, n_kv_heads, n_k, _) = q.shape, k.shape
    output, scores = torch.zeros_like(q), q.new_zeros(n_batch, n_heads, n_k)
    mask, window, cap = given.get("key_mask"), given.get("sliding_window"), given.get("softcap")
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (n_batch, n_heads, n_q))).tolist():
        g, weights = h // (n_heads // n_kv_heads), {}
        at = given["key_positions"][b, g].tolist() if "key_positions" in given else list(range(n_k))
        before_last = n_q - 1 - i  # the last query is the last key
        for j in range(n_k):
            after = given.get("is_causal", False) and j > n_k - 1 - before_last
            too_old = window is not None and (at[-1] - before_last) - at[j] >= window
            hidden = mask is not None and not (mask[b, j] if mask.ndim == 2 else mask[b, g, j])
            if not (after or too_old or hidden):
                logit = float(q[b, h, i] @ k[b, g, j]) * given.get("scale", dim**-0.5)
                weights[j] = math.exp(logit if cap is None else cap * math.tanh(logit / cap))
        for j, weight in weights.items():
            share = weight / sum(weights.values())
            output[b, h, i] += share * v[b, g, j]
            if before_last < given.get("score_queries", n_q) and before_last % given.get("score_step", 1) == 0:
                scores[b, h, j] += share
    return output, scores


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Plain causal attention as model files write it, in the dtype of its inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0) @ v


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Operator on float32 against the reference on float64."""
    output, scores = attend(q, k, v, **options)
    exact, exact_scores = attention_reference(q.double(), k.double(), v.double(), **options)
    assert output.shape == q.shape and output.dtype == q.dtype
    assert scores.shape == (*q.shape[:2], k.shape[2]) and scores.dtype == torch.float32
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-9)
    return output, scores


@pytest.mark.parametrize(("n_q", "n_k"), [(5, 5), (3, 6), (6, 3), (1, 4)])
@pytest.mark.parametrize("name", OPTIONS)
def test_reference_is_the_definition(name: str, n_q: int, n_k: int) -> None:
    q, k, v = inputs(n_q, n_k, dim=8, dtype=torch.float64)
    options = options_for(name, k)
    for got, expected in zip(attention_reference(q, k, v, **options), by_loops(q, k, v, **options), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("counted", "expected"),
    [
        ({"score_step": 1}, [25 / 12, 13 / 12, 7 / 12, 1 / 4]),
        ({"score_step": 2}, [3 / 4, 3 / 4, 1 / 4, 1 / 4]),  # the rows of two keys and of four
        ({"score_step": 3}, [5 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ({"score_step": 4}, [1 / 4] * 4),
        ({"score_step": 2**40}, [1 / 4] * 4),
        ({"score_step": 2, "score_queries": 3}, [3 / 4, 3 / 4, 1 / 4, 1 / 4]),
        ({"score_step": 3, "score_queries": 3}, [1 / 4] * 4),
        ({"score_step": 2, "score_queries": 2}, [1 / 4] * 4),
        ({"score_step": 3, "score_queries": 9}, [5 / 4, 1 / 4, 1 / 4, 1 / 4]),
        ({"score_step": 2, "score_queries": 0}, [0.0] * 4),
    ],
)
def test_steps_by_hand(counted: dict[str, int], expected: list[float]) -> None:
    """Equal logits, causal: the four rows give 1, 1/2, 1/3 and 1/4 to each key that they see."""
    q = k = torch.zeros(1, 1, 4, 8)
    for operator in (attend, attention_reference):
        torch.testing.assert_close(operator(q, k, k, is_causal=True, **counted)[1], torch.tensor([[expected]]))


def random_options(rng: random.Random, k: Tensor, n_q: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rng.randrange(10**6))
    options: dict[str, Any] = {"is_causal": rng.random() < 0.7, "score_step": rng.choice([1, 2, 3, 7, 64])}
    options["score_queries"] = rng.choice([None, rng.randint(0, n_q), n_q // 2 + 1])
    if rng.random() < 0.4:
        shape = k.shape[:3] if rng.random() < 0.5 else (k.shape[0], k.shape[2])
        options["key_mask"] = torch.rand(shape, generator=generator) < 0.67
    if options["is_causal"] and rng.random() < 0.5:
        options["sliding_window"] = rng.choice([1, 5, 40])
        if rng.random() < 0.5:
            options["key_positions"] = torch.randint(1, 4, k.shape[:3], generator=generator).cumsum(-1)
    if rng.random() < 0.3:
        options["softcap"] = 2.0
    return options


@pytest.mark.parametrize("seed", range(60))
def test_random_steps_in_float64(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setitem(blockwise.MAX_LOGITS, "cpu", rng.choice([1, 700, 4000, 2**22]))
    n_q, n_k = rng.choice([1, 2, 9, 33, 70]), rng.choice([1, 9, 33, 70])
    q, k, v = inputs(n_q, n_k, rng.choice(list(HEADS)), dim=8, dtype=torch.float64)
    options = random_options(rng, k, n_q)
    output, scores = attend(q, k, v, **options)
    exact, exact_scores = attention_reference(q, k, v, **options)
    torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, exact_scores.float(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_the_model_s_own_eager_attention_scores_the_same_rows(seed: int) -> None:
    module, rng = tiny_model("llama", "eager").model.layers[0].self_attn, random.Random(seed)
    n_q, n_k = rng.choice([1, 9, 33]), rng.choice([9, 33])
    q, k, v = inputs(n_q, n_k, "mha", dim=8)
    k, v = k[:, :: module.num_key_value_groups], v[:, :: module.num_key_value_groups]
    options = random_options(rng, k, n_q) | {"softcap": None}  # Llama's has none
    output, scores = _eager_operator(module, q, k, v, scale=8**-0.5, **options)
    exact, exact_scores = attention_reference(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (7, 7), (33, 33), (111, 111), (1, 63), (7, 111), (63, 7), (33, 1)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_keyword_at_odd_sizes(name: str, n_q: int, n_k: int) -> None:
    q, k, v = inputs(n_q, n_k)
    output, scores = check(q, k, v, **options_for(name, k))
    if name in ("plain", "causal", "softcap", "scale") and n_q > 1 and n_k > 1:
        assert scores.flatten().unique().numel() > 0.9 * min(n_q, n_k) / n_k * scores.numel()
        assert output.std() > 0.1


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_at_most_that_of_eager(dtype: torch.dtype, dim: int, heads: str) -> None:
    for n_q, n_k in ((63, 63), (7, 33), (33, 7)):
        q, k, v = inputs(n_q, n_k, heads, dim, dtype)
        output, scores = attend(q, k, v, is_causal=True)
        exact, exact_scores = attention_reference(q.double(), k.double(), v.double(), is_causal=True)
        assert output.dtype == dtype
        error, allowed = output.double() - exact, eager(q, k, v).double() - exact
        # In float32 both do the same arithmetic, but for the BLAS's order of summation: sqrt(D) roundings of a dot.
        rounding = torch.finfo(dtype).eps * (dim**0.5 if dtype == torch.float32 else 1)
        assert rms(error) <= rms(allowed) + rounding * rms(exact)
        assert error.abs().max() <= 2 * (allowed.abs().max() + rounding * exact.abs().max())
        torch.testing.assert_close(scores.double(), exact_scores, rtol=1e-5, atol=1e-9)


def test_float64_is_computed_in_float64() -> None:
    q, k, v = inputs(33, 33, dtype=torch.float64)
    output, scores = attend(q, k, v, is_causal=True)
    exact, exact_scores = attention_reference(q, k, v, is_causal=True)
    torch.testing.assert_close(output, exact, rtol=1e-12, atol=1e-12)
    assert torch.equal(scores, exact_scores.float())


@pytest.mark.parametrize("name", ["plain", "causal", "window", "window_cut", "mask_2d", "all"])
def test_no_queries_or_no_keys(name: str) -> None:
    q, k, v = inputs(0, 7)
    earlier = torch.rand(2, 6, 7)
    output, scores = attend(q, k, v, earlier, **options_for(name, k))
    assert output.shape == q.shape and torch.equal(scores, earlier) and scores is not earlier
    q, k, v = inputs(7, 0)
    output, scores = attend(q, k, v, **options_for(name, k))
    assert torch.equal(output, torch.zeros_like(q)) and scores.shape == (2, 6, 0)
    exact, exact_scores = attention_reference(q, k, v, **options_for(name, k))
    assert torch.equal(exact, output) and torch.equal(exact_scores, scores)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("n_q", "n_k"), [(33, 33), (63, 7), (7, 63)])
@pytest.mark.parametrize("name", OPTIONS)
def test_scores_sum_to_the_rows_that_count(name: str, n_q: int, n_k: int) -> None:
    q, k, v = inputs(n_q, n_k)
    options = options_for(name, k)
    output, scores = attend(q, k, v, **options)
    # With equal logits and values of one, an output of 1 tells the rows, and a score > 0 the keys, that are seen.
    ones, seen = attention_reference(0 * q.double(), 0 * k.double(), 0 * v.double() + 1, **options)
    sees = ones[..., 0] > 0.5
    counted = sees[:, :, counted_rows(n_q, options.get("score_queries"), options.get("score_step", 1))]
    torch.testing.assert_close(scores.sum(-1), counted.sum(-1).float(), rtol=1e-5, atol=0)
    assert (scores >= 0).all() and torch.equal(scores == 0, seen == 0)
    assert torch.equal(output[~sees], torch.zeros_like(output[~sees])) and (output[sees] != 0).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["causal", "window", "window_cut", "mask_2d", "mask_3d", "softcap"])
@pytest.mark.parametrize("per_kv_head", [False, True])
def test_chunks_are_one_pass(name: str, per_kv_head: bool) -> None:
    q, k, v = inputs(33, 33)
    options = {**options_for(name, k), "is_causal": True}
    if "key_positions" in options:  # the window compares positions: those of new tokens follow each other
        options["key_positions"] = torch.arange(33).expand(2, 2, 33)
    output, scores = attend(q, k, v, **options, per_kv_head=per_kv_head)
    chunks, summed = [], None
    for start, stop in ((0, 7), (7, 8), (8, 31), (31, 33)):
        cut = {key: x[..., :stop] if isinstance(x, Tensor) else x for key, x in options.items()}
        arguments = q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], summed
        before = None if summed is None else summed.clone()
        chunk, new = attend(*arguments, **cut, per_kv_head=per_kv_head)
        assert before is None or torch.equal(summed, before)
        chunks.append(chunk)
        summed = new
    torch.testing.assert_close(torch.cat(chunks, 2), output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(summed, scores, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("heads", HEADS)
def test_per_kv_head_sums_each_group(heads: str) -> None:
    q, k, v = inputs(33, 33, heads)
    n_heads, n_kv_heads = HEADS[heads]
    output, scores = attend(q, k, v, is_causal=True)
    same, summed = attend(q, k, v, is_causal=True, per_kv_head=True)
    assert torch.equal(same, output) and summed.shape == (2, n_kv_heads, 33)
    group = n_heads // n_kv_heads
    by_hand = torch.stack([scores[:, g * group : (g + 1) * group].sum(1) for g in range(n_kv_heads)], 1)
    torch.testing.assert_close(summed, by_hand)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["causal", "all"])
def test_non_contiguous_inputs(name: str) -> None:
    q, k, v = inputs(33, 33)
    options = options_for(name, k)
    expected = attend(q, k, v, **options)
    fused = torch.cat([q, k, v], 1).transpose(1, 2).contiguous().transpose(1, 2)  # [B, N, H, D] in memory
    q, k, v = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    assert not any(x.is_contiguous() for x in (q, k, v))
    for key in options.keys() & {"key_mask", "key_positions"}:
        options[key] = options[key].mT.contiguous().mT
    for got, wanted in zip(attend(q, k, v, **options), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits(dtype: torch.dtype, sign: int) -> None:
    q = torch.full((1, 2, 111, 32), 16.0, dtype=dtype)
    k = torch.full((1, 2, 111, 32), sign * 20.0, dtype=dtype)
    k[:, :, 1::2] *= -1  # logits of +-10240 in turn
    v = torch.arange(111, dtype=dtype)[None, None, :, None].expand_as(k)
    output, scores = attend(q, k, v, is_causal=True, scale=1.0)
    wanted = attention_reference(q.double(), k.double(), v.double(), is_causal=True, scale=1.0)
    torch.testing.assert_close(output, wanted[0].to(dtype))
    torch.testing.assert_close(scores, wanted[1].float(), rtol=1e-5, atol=0)
    assert (scores == 0).sum() >= 54 * 2
