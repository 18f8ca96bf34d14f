"""What holds for every cut, whatever the keys, scores, budget and padding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cab_attention import CAB, AdaKV, ExpectedAttention, KeyDiff, KeyNorm, Method, PyramidKV, SnapKV
from cab_attention.cut import slots_to_keep
from cab_attention.methods import CachedKeys
from tests.all_methods import EVICTING, METHODS

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
LAYERS, DIM = 3, 4
seeds, budgets = st.integers(0, 10_000), st.integers(1, 60)
paddings = st.lists(st.integers(0, 40), min_size=1, max_size=3)  # of each row


def cached_keys(seed: int, padding: list[int], budget: int, *, n_keys=45, n_heads=2, ties=True) -> CachedKeys:
    """What a layer holds before a cut. With `ties` scores are small whole numbers, and keys repeat."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(len(padding), n_heads, *shape, generator=generator)

    keys, scores = random(n_keys, DIM), random(n_keys).abs()
    if ties:
        keys, scores = keys.round(), (3 * scores).floor()
    positions = torch.arange(n_keys).repeat(len(padding), n_heads, 1)
    empty = positions < torch.tensor(padding)[:, None, None]
    root = random(DIM, DIM)
    return CachedKeys(
        keys=keys,
        values=random(n_keys, DIM),
        positions=positions.masked_fill(empty, -1),
        scores=scores,
        queries=lambda n: (root[:, :, 0], root @ root.mT),
        budget=torch.full((len(padding), 1, 1), budget),
        layer_index=1,
        peers=(1, LAYERS),
        sample_ids=tuple(f"sample {i}" for i in range(len(padding))),
    )


def kept(method: Method, cached: CachedKeys) -> list[list[list[int]]]:
    """Slots by row and head."""
    slots = slots_to_keep(method, [cached], int(cached.budget.max()))
    slots = slots.expand(-1, cached.positions.shape[1], -1)
    assert (slots.diff(dim=-1) > 0).logical_or(slots[..., 1:] < 0).all()  # ascending, the empty ones first
    return [[[slot for slot in head if slot >= 0] for head in row] for row in slots.tolist()]


@quick
@given(seed=seeds, padding=paddings, budget=budgets)
@pytest.mark.parametrize("name", EVICTING)
def test_the_keys_of_highest_priority_stay(name, seed, padding, budget):
    """Of equals the lower position; of padding nothing; and as many as the budget says."""
    method, cached = METHODS[name](budget), cached_keys(seed, padding, budget)
    chosen = kept(method, cached)
    together = method.granularity == "layer"
    scored = replace(cached, scores=method.scores(cached))
    if together:
        scored = replace(scored, scores=scored.scores.sum(1, keepdim=True).expand(-1, 2, -1))
    priorities, counts = method.priorities(scored).tolist(), method.budgets(scored).expand(-1, 2, 1).tolist()
    for row, n_pad in enumerate(padding):
        for head in range(2):
            of_key = priorities[row][head]
            best = sorted(range(n_pad, 45), key=lambda slot: (-of_key[slot], slot))
            assert chosen[row][head] == sorted(best[: counts[row][head][0]])
        n_kept = [len(head) for head in chosen[row]]
        if name == "adakv":
            assert sum(n_kept) == 2 * min(budget, 45 - n_pad)
        elif name != "pyramidkv":
            assert n_kept == [min(budget, 45 - n_pad)] * 2


SINKS = {"streaming_llm": 4, "expected_attention": 4}
RECENT = {  # of a budget
    "random": lambda b: 1,
    "streaming_llm": lambda b: b - min(4, b // 2),
    "h2o": lambda b: b // 2,
    "snapkv": lambda b: min(8, b // 2),
    "pyramidkv": lambda b: min(8, b // 2),
    "adakv": lambda b: min(8, b // 2),
    "cab": lambda b: max(1, 3 * b // 10),
    "cab_redundancy": lambda b: max(1, 3 * b // 10),
    "cab_median": lambda b: max(1, 3 * b // 10),
}


@quick
@given(seed=seeds, padding=paddings, budget=budgets)
@pytest.mark.parametrize("name", {**SINKS, **RECENT})
def test_sinks_and_the_recent_window_stay(name, seed, padding, budget):
    chosen = kept(METHODS[name](budget), cached_keys(seed, padding, budget))
    for row, n_pad in enumerate(padding):
        sinks = range(n_pad, min(45, n_pad + min(SINKS.get(name, 0), budget // 2)))
        recent = range(max(n_pad, 45 - RECENT.get(name, lambda b: 0)(budget)), 45)
        for head in chosen[row]:
            assert {*sinks, *recent} <= {*head}


# Where a larger budget keeps all that a smaller one does, by definition: the ranking hangs on the budget only in what
# always stays (H2O's oldest recent key is still recent, or was a heavy hitter before it became recent). From the second
# number on, where there is one: below twice the window SnapKV's pooling sees other keys, and below twice the sinks
# expected attention scores some of them.
NEST = {"random": 1, "streaming_llm": 1, "h2o": 1, "tova": 1, "key_norm": 1, "key_diff": 1}
NEST |= {"snapkv": 16, "expected_attention": 8}


@quick
@given(seed=seeds, padding=paddings, smaller=budgets, more=st.integers(1, 20))
@pytest.mark.parametrize("name", NEST)
def test_budgets_nest(name, seed, padding, smaller, more):
    smaller = max(smaller, NEST[name])
    one, other = (kept(METHODS[name](b), cached_keys(seed, padding, b)) for b in (smaller, smaller + more))
    for row in range(len(padding)):
        for head in range(2):
            assert {*one[row][head]} <= {*other[row][head]}


@pytest.mark.parametrize("name", [name for name in EVICTING if name not in NEST])
def test_other_methods_do_not_nest(name):
    """CAB's shares and the budgets of layers and heads trade keys for one another."""

    def nests(seed, b):
        one, other = (kept(METHODS[name](b), cached_keys(seed, [0], b, ties=False)) for b in (b, b + 1))
        return all({*one[0][head]} <= {*other[0][head]} for head in range(2))

    assert not all(nests(seed, b) for seed in range(20) for b in range(1, 45))


@quick
@given(seed=seeds, padding=paddings, budget=budgets, order=st.permutations(range(4)))
@pytest.mark.parametrize("name", [name for name in EVICTING if name != "random"])  # it draws by head
def test_heads_have_no_order(name, seed, padding, budget, order):
    """But where equal fractions are rounded, which AdaKV does with a safeguard."""
    cached = cached_keys(seed, padding, budget, n_heads=4, ties=False)
    mean, covariance = cached.queries(1)
    permuted = replace(
        cached,
        **{field: getattr(cached, field)[:, order] for field in ("keys", "values", "positions", "scores")},
        queries=lambda n: (mean[:, order], covariance[:, order]),
    )
    method = METHODS[name](budget) if name != "adakv" else AdaKV(budget, window=8, safeguard=0)
    expected = [[row[head] for head in order] for row in kept(method, cached)]
    assert kept(method, permuted) == expected


@quick
@given(seed=seeds, padding=paddings, budget=budgets, n_free=st.integers(0, 5))
@pytest.mark.parametrize("name", EVICTING)
def test_a_row_knows_nothing_of_the_others_nor_of_its_padding(name, seed, padding, budget, n_free):
    method, cached = METHODS[name](budget), cached_keys(seed, padding, budget)
    together = kept(method, cached)
    for row, n_pad in enumerate(padding):
        first = max(0, n_pad - n_free)
        mean, covariance = (x[row : row + 1] for x in cached.queries(1))
        alone = replace(
            cached,
            **{field: getattr(cached, field)[row : row + 1, :, first:] for field in ("keys", "values", "scores")},
            positions=cached.positions[row : row + 1, :, first:],
            queries=lambda n, moments=(mean, covariance): moments,
            budget=cached.budget[row : row + 1],
            sample_ids=cached.sample_ids[row : row + 1],
        )
        assert [[slot + first for slot in head] for head in kept(method, alone)[0]] == together[row]


@settings(quick, max_examples=150)
@given(
    budget=budgets,
    n_keys=st.integers(1, 90),
    window=st.integers(1, 40),
    n_layers=st.integers(1, 40),
    beta=st.integers(1, 30),
)
def test_the_mean_over_pyramidkvs_layers_is_the_budget(budget, n_keys, window, n_layers, beta):
    method = PyramidKV(budget, window=window, beta=beta)
    cached = cached_keys(0, [0], budget, n_keys=n_keys)
    given_to = [int(method.budgets(replace(cached, peers=(index, n_layers)))[0, 0, 0]) for index in range(n_layers)]
    assert sum(given_to) == n_layers * min(budget, n_keys)
    assert max(given_to) <= n_keys and min(given_to) >= min(window, budget // 2, n_keys)
    assert given_to == sorted(given_to, reverse=True)
    if n_keys >= 2 * budget and n_layers > 1:  # then the pyramid is straight: its two ends mirror each other
        assert all(abs(a + b - 2 * budget) <= 1 for a, b in zip(given_to, given_to[::-1], strict=True))


@settings(quick, max_examples=150)
@given(
    seed=seeds,
    padding=paddings,
    budget=budgets,
    window=st.integers(1, 40),
    n_heads=st.integers(1, 5),
    safeguard=st.sampled_from([0, 0.2, 1 / 3, 0.5, 1]),
    ties=st.booleans(),
)
def test_the_mean_over_adakvs_heads_is_the_budget(seed, padding, budget, window, n_heads, safeguard, ties):
    method = AdaKV(budget, window=window, safeguard=safeguard)
    chosen = kept(method, cached_keys(seed, padding, budget, n_heads=n_heads, ties=ties))
    for row, n_pad in zip(chosen, padding, strict=True):
        b = min(budget, 45 - n_pad)
        w = min(window, budget // 2, b)
        counts = [len(head) for head in row]
        assert sum(counts) == n_heads * b
        assert min(counts) >= w + int(safeguard * (b - w))
        assert counts == [b] * n_heads or safeguard < 1


@quick
@given(seed=seeds, padding=paddings, budget=budgets)
def test_adakv_with_nothing_but_safeguard_is_snapkv(seed, padding, budget):
    cached = cached_keys(seed, padding, budget)
    pooling = dict(window=8, kernel_size=7, pooling="max")
    assert kept(AdaKV(budget, safeguard=1, **pooling), cached) == kept(SnapKV(budget, **pooling), cached)


SETS = [KeyNorm, KeyDiff, ExpectedAttention, lambda b, **o: SnapKV(b, window=8, **o)]
SETS += [lambda b, **o: CAB(b, block_size=4, **o), lambda b, **o: CAB(b, bridge="median", **o)]


@quick
@given(seed=seeds, padding=paddings, budget=budgets)
@pytest.mark.parametrize("make", SETS)
def test_a_model_of_one_layer_is_a_layer(make, seed, padding, budget):
    cached = cached_keys(seed, padding, budget)
    assert kept(make(budget, granularity="model"), cached) == kept(make(budget, granularity="layer"), cached)
