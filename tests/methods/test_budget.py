import math

import numpy as np
import pytest

from cab_attention import CAB, H2O, AdaKV, Budget, ExpectedAttention, Full, PyramidKV, SnapKV, StreamingLLM
from tests.all_methods import EVICTING, METHODS


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        (1, "tokens", 1),
        (64, "tokens", 64),
        (np.int64(64), "tokens", 64),
        (0.25, "fraction", 0.25),
        (1e-9, "fraction", 1e-9),
        (np.float32(0.5), "fraction", 0.5),
        ("full", "full", None),
        (1.0, "full", None),
    ],
)
def test_what_is_a_budget(given, kind, value):
    budget = Budget.parse(given)
    assert (budget.kind, budget.value) == (kind, value)
    assert type(budget.value) in (int, float, type(None))
    assert Budget.parse(budget) == budget


REFUSED = [0, -1, 1.5, 0.0, -0.5, 64.0, True, False, "abc", "", "64", "0.5", None, math.nan, math.inf, [64], {}]


@pytest.mark.parametrize("given", REFUSED)
def test_what_is_refused(given):
    with pytest.raises(ValueError, match="allowed is") as error:
        Budget.parse(given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize("name", EVICTING)
def test_every_method_refuses_it(name):
    for given in (0, 1.5, "64", None, True):
        with pytest.raises(ValueError, match="budget"):
            METHODS[name](given)


@pytest.mark.parametrize(
    ("fraction", "n", "tokens"),
    [
        (0.5, 10, 5),
        (0.5, 11, 6),  # half up, where Python's round() goes to the even number
        (0.5, 13, 7),
        (0.25, 10, 3),
        (0.25, 9, 2),
        (0.1, 4, 1),  # at least one
        (0.001, 1, 1),
        (0.999, 10, 10),
        (0.2, 32768, 6554),
    ],
)
def test_a_fraction_is_rounded_half_up(fraction, n, tokens):
    assert Budget.parse(fraction).tokens(n) == tokens


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.77])
def test_a_fraction_against_its_definition(fraction):
    for n in range(1, 300):
        assert Budget.parse(fraction).tokens(n) == max(1, math.floor(fraction * n + 0.5))


def test_tokens_and_full_are_never_more_than_there_are():
    assert [Budget.parse(8).tokens(n) for n in (5, 8, 9)] == [5, 8, 8]
    assert Budget.parse("full").tokens(7) == Budget.parse(1.0).tokens(7) == 7


def test_full_evicts_nothing_whatever_the_method():
    assert not Full().evicts and not H2O("full").evicts and not CAB(1.0).evicts
    assert H2O(1).evicts and H2O(0.99).evicts


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (StreamingLLM, {"sinks": -1}),
        (StreamingLLM, {"sinks": True}),
        (H2O, {"recent": -1}),
        (H2O, {"recent": 0.5}),
        (SnapKV, {"window": 0}),
        (SnapKV, {"kernel_size": 4}),
        (SnapKV, {"kernel_size": -1}),
        (SnapKV, {"pooling": "sum"}),
        (PyramidKV, {"beta": 0}),
        (PyramidKV, {"window": 0}),
        (AdaKV, {"safeguard": -0.1}),
        (AdaKV, {"safeguard": 1.1}),
        (AdaKV, {"safeguard": math.nan}),
        (AdaKV, {"kernel_size": 4}),
        (ExpectedAttention, {"sinks": -1}),
        (ExpectedAttention, {"n_future": 0}),
        (CAB, {"block_size": 0}),
        (CAB, {"bridge": "ollivier"}),
        (CAB, {"redundancy": -0.1}),
        (CAB, {"redundancy": math.nan}),
    ],
)
def test_options_out_of_range_are_refused(method, wrong):
    ((option, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{option}={value!r}, allowed"):
        method(64, **wrong)


@pytest.mark.parametrize(
    ("method", "budget", "effective"),
    [
        (StreamingLLM(64), 64, {"sinks_eff": 4}),
        (StreamingLLM(5), 5, {"sinks_eff": 2}),
        (StreamingLLM(1), 1, {"sinks_eff": 0}),
        (SnapKV(128), 128, {"window_eff": 32}),
        (SnapKV(33), 33, {"window_eff": 16}),
        (SnapKV(1), 1, {"window_eff": 0}),
        (PyramidKV(128), 128, {"window_eff": 32}),
        (AdaKV(33), 33, {"window_eff": 16}),
        (ExpectedAttention(64), 64, {"sinks_eff": 4}),
        (ExpectedAttention(5), 5, {"sinks_eff": 2}),
        (H2O(9), 9, {"window_eff": 4}),
        (H2O(9, recent=2), 9, {"window_eff": 2}),
        (H2O(9, recent=8), 9, {"window_eff": 4}),
    ],
)
def test_a_tiny_budget_is_not_all_window(method, budget, effective):
    assert method.effective(budget) == effective
