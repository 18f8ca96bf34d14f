"""What the benchmark holds a provider's result against: right ones pass, wrong ones do not."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cab_attention.kernels.reference import attention_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

from kernel_checks import Inputs, Result, Shape, expect, make_inputs, problem_with
from kernel_providers import PROVIDERS

SMALL = Shape(96, 96, batch=2, heads=4, kv_heads=2, head_dim=16, dtype="float32")


@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        replace(SMALL, causal=False),
        replace(SMALL, score_queries=5),
        replace(SMALL, n_queries=7, n_keys=300),
        replace(SMALL, n_queries=1, dtype="bfloat16"),
    ],
)
def test_sample_is_that_of_the_reference(shape: Shape, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kernel_checks.BLOCK_LOGITS", 2000)  # several blocks of rows
    inputs = make_inputs(shape, "cpu")
    output, scores = attention_reference(
        *(tensor.double() for tensor in (inputs.q, inputs.k, inputs.v)),
        is_causal=shape.causal,
        score_queries=shape.score_queries,
    )
    expected = expect(inputs)
    torch.testing.assert_close(expected.output, output[:, :, expected.rows])
    torch.testing.assert_close(expected.scores, scores[:, :, expected.columns])
    assert expected.columns[0] == 0 and expected.columns[-1] == shape.n_keys - 1


def test_large_shapes_are_checked_too(monkeypatch: pytest.MonkeyPatch):
    inputs = make_inputs(SMALL, "cpu")
    exact = expect(inputs)
    monkeypatch.setattr("kernel_checks.FLOAT64_LOGITS", 0)
    torch.testing.assert_close(expect(inputs).scores, exact.scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ours", "eager", "sdpa", "sdpa_repeated"])
@pytest.mark.parametrize(
    "shape",
    [
        SMALL,
        replace(SMALL, dtype="bfloat16", head_dim=64),
        replace(SMALL, n_queries=1),
        replace(SMALL, kv_heads=4, dtype="float16"),
    ],
)
def test_right_providers_pass(name: str, shape: Shape):
    inputs = make_inputs(shape, "cpu")
    assert problem_with(PROVIDERS[name](inputs).call(), expect(inputs)) is None


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_scores_of_the_last_queries(name: str):
    inputs = make_inputs(replace(SMALL, score_queries=5), "cpu")
    result = PROVIDERS[name](inputs).call()
    assert problem_with(result, expect(inputs)) is None
    assert "scores" in (problem_with(result, expect(make_inputs(SMALL, "cpu"))) or "")


def right_result() -> tuple[Inputs, Result]:
    inputs = make_inputs(SMALL, "cpu")
    output, scores = attention_reference(inputs.q, inputs.k, inputs.v, is_causal=True)
    return inputs, Result(output, scores, expect(inputs).lse, scores.mean(1) / SMALL.n_queries)


def set_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0, -1] = torch.nan
    return tensor


@pytest.mark.parametrize(
    "wrong",
    [
        {"output": lambda tensor: tensor.flip(1)},
        {"output": lambda tensor: tensor * 1.02},
        {"output": set_nan},
        {"scores": lambda tensor: tensor.flip(1)},
        {"scores": lambda tensor: tensor.roll(1, -1)},
        {"scores": set_nan},
        {"lse": lambda tensor: tensor * 1.4427},
        {"mean_scores": lambda tensor: tensor * SMALL.heads},
    ],
)
def test_wrong_results_are_found(wrong: dict[str, Any]):
    inputs, right = right_result()
    assert problem_with(right, expect(inputs)) is None
    [(name, spoil)] = wrong.items()
    assert problem_with(right._replace(**{name: spoil(getattr(right, name))}), expect(inputs)) is not None


def test_a_result_of_nothing_is_wrong():
    assert problem_with(Result(), expect(make_inputs(SMALL, "cpu"))) == "it returned nothing"


def test_causal_of_torch_is_refused_where_it_is_another():
    with pytest.raises(ValueError, match="bottom-right"):
        PROVIDERS["sdpa"](make_inputs(replace(SMALL, n_queries=7), "cpu"))
