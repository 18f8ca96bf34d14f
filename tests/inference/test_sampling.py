"""Draws follow the distribution that temperature, top-k and top-p define, and depend on their seed alone."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from cab_attention.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.5, 2.0, -1.0, 2.0, 1.0, -3.0, 0.0])


def expected(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """By plain loops: probabilities of all tokens."""
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = order[: top_k or len(order)]
    total, kept, mass = sum(weights[token] for token in order), [], 0.0
    for token in order:
        if mass < top_p * total - 1e-12:
            kept.append(token)
        mass += weights[token]
    result = np.zeros(len(weights))
    for token in kept:
        result[token] = weights[token] / sum(weights[other] for other in kept)
    return result


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.8, 1.0])
def test_distribution(temperature: float, top_k: int, top_p: float):
    probabilities, tokens = Sampling(temperature, top_p, top_k).distribution(LOGITS)
    dense = torch.zeros(len(LOGITS), dtype=torch.float64).scatter(0, tokens, probabilities).numpy()
    np.testing.assert_allclose(dense, expected(temperature, top_k, top_p), rtol=1e-6, atol=1e-9)
    assert (probabilities.diff() <= 0).all()


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9}])
def test_frequencies(options: dict[str, Any]):
    n_draws, sampler = 1500, Sampler(Sampling(**options, seed=1))
    counts = np.bincount([sampler.draw(LOGITS) for _ in range(n_draws)], minlength=len(LOGITS))
    wanted = expected(options["temperature"], options.get("top_k", 0), options.get("top_p", 1.0)) * n_draws
    assert (counts[wanted == 0] == 0).all()
    wanted, counts = wanted[wanted > 0], counts[wanted > 0]
    chi_squared = ((counts - wanted) ** 2 / wanted).sum()
    assert chi_squared < len(wanted) - 1 + 5 * math.sqrt(2 * (len(wanted) - 1))


def test_seeds():
    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.draw(LOGITS) for _ in range(40)]

    before = torch.get_rng_state()
    assert drawn(3) == drawn(3) != drawn(4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 1e-6}])
def test_the_most_likely_token(options: dict[str, Any]):
    temperature = 1.0 if options else 0.0
    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(temperature, **options))
    assert [sampler.draw(row) for row in logits] == logits.argmax(-1).tolist()


def test_a_tiny_temperature():
    assert Sampler(Sampling(1e-300)).draw(torch.tensor([0.0, 5.0, 4.0])) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_must_be_numbers(value: float):
    logits = LOGITS.clone()
    logits[4] = value
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="highest logit"):
            Sampler(Sampling(temperature)).draw(logits)
    with pytest.raises(FloatingPointError):
        Sampler(Sampling()).draw(torch.full((3,), -math.inf))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-1, math.nan, math.inf, "1", True)),
        *(("top_p", value) for value in (0, 1.1, math.nan, None)),
        *(("top_k", value) for value in (-1, 1.5, True)),
        *(("seed", value) for value in (-1, 2**63, 0.5)),
    ],
)
def test_bad_options(option: str, value: object):
    with pytest.raises(ValueError, match=f"^{option}="):
        Sampling(**{option: value})
