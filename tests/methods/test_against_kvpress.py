"""Scores and kept positions against those that kvpress 0.5.5 gave on the same model and text.

tests/reference/README.md says how its definitions differ; where they do, the difference is applied here and the rest is
equal.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from cab_attention import (
    H2O,
    TOVA,
    AdaKV,
    EvictingCache,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    Method,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)
from tests.feeding import feed
from tests.reference.fixed_model import N_TOKENS, fixed_ids, fixed_model

KVPRESS = json.loads((Path(__file__).parents[1] / "reference" / "kvpress.json").read_text())
WINDOW, BUDGETS = KVPRESS["window"], KVPRESS["budgets"]
N_LAYERS, GROUP, N_HEADS = 3, 3, 6
METHODS = {
    "StreamingLLMPress": StreamingLLM,
    "SnapKVPress": lambda budget: SnapKV(budget, window=WINDOW),
    "KnormPress": KeyNorm,
    "KeyDiffPress": KeyDiff,
    "ExpectedAttentionPress": ExpectedAttention,
}


def ranks_and_kept(method: Method) -> tuple[np.ndarray, list[list[set[int]]]]:
    """What the method ranks the prompt's keys by [layers, heads, keys], and the positions that it keeps."""
    ranks, priorities = {}, type(method).priorities

    def recording(self, cached):
        ranks[cached.layer_index] = priorities(self, cached)[0].expand(2, -1).numpy()
        return priorities(self, cached)

    model = fixed_model("cab")
    cache = EvictingCache(model.config, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "priorities", recording)
        feed(model, cache, fixed_ids())
    kept = [[{*head} - {-1} for head in layer.positions[0].tolist()] for layer in cache.layers]
    return np.stack([ranks[index] for index in range(N_LAYERS)]), kept


def kvpress_scores(press: str) -> np.ndarray:
    """[layers, heads, keys]."""
    return np.array(KVPRESS[f"{press} scores"])


def kvpress_kept(press: str, budget: int) -> list[list[set[int]]]:
    return [[{*head} for head in layer] for layer in KVPRESS[f"{press} kept {budget}"]]


def highest(ranks: np.ndarray, count: int) -> list[list[set[int]]]:
    return [[{*np.argsort(-head, kind="stable")[:count].tolist()} for head in layer] for layer in ranks]


def test_the_text_is_the_same():
    assert fixed_ids()[0].tolist() == KVPRESS["ids"] and len(KVPRESS["ids"]) == N_TOKENS


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("press", METHODS)
def test_the_same_keys_stay(press, budget):
    _, kept = ranks_and_kept(METHODS[press](budget))
    assert kept == kvpress_kept(press, budget)


@pytest.mark.parametrize(
    ("press", "scored", "factor"),
    [
        ("KnormPress", slice(None), 1),
        ("KeyDiffPress", slice(None), 1),
        ("ExpectedAttentionPress", slice(4, None), 1),  # sinks rank first in both
        ("SnapKVPress", slice(-WINDOW), WINDOW * GROUP),  # the mean over queries and query heads there, the sum here
    ],
)
def test_the_same_scores(press, scored, factor):
    ranks, _ = ranks_and_kept(METHODS[press](BUDGETS[0]))
    expected = kvpress_scores(press)[..., scored] * factor
    np.testing.assert_allclose(ranks[..., scored], expected, rtol=1e-4, atol=1e-6)


def test_tova_but_for_the_last_token():
    """There the last token always stays. Scores are means over query heads there, sums here."""
    ranks, _ = ranks_and_kept(TOVA(BUDGETS[0]))
    np.testing.assert_allclose(ranks[..., :-1], kvpress_scores("TOVAPress")[..., :-1] * N_HEADS, rtol=1e-4)
    ranks[..., -1] = np.inf
    for budget in BUDGETS:
        assert highest(ranks, budget) == kvpress_kept("TOVAPress", budget)
        _, kept = ranks_and_kept(TOVA(budget))
        for ours, theirs in zip(kept, kvpress_kept("TOVAPress", budget), strict=True):
            assert theirs[0] - ours[0] <= {N_TOKENS - 1} and theirs[1] - ours[1] <= {N_TOKENS - 1}


def test_h2o_but_for_the_recent_half_and_the_mean_over_queries():
    """There a key's score is the mean over the queries that see it and over query heads, here the sum."""
    ranks, _ = ranks_and_kept(H2O(BUDGETS[0], recent=0))
    means = ranks / np.arange(N_TOKENS, 0, -1) / GROUP
    np.testing.assert_allclose(means, kvpress_scores("ObservedAttentionPress"), rtol=1e-4)
    for budget in BUDGETS:
        assert highest(means, budget) == kvpress_kept("ObservedAttentionPress", budget)


def test_pyramidkv_but_for_the_budgets():
    """There the window is part of the pyramid, and where the last layer would keep less than it, there is none."""
    ranks, _ = ranks_and_kept(PyramidKV(BUDGETS[0], window=WINDOW))
    expected = kvpress_scores("PyramidKVPress")[..., :-WINDOW] * WINDOW * GROUP
    np.testing.assert_allclose(ranks[..., :-WINDOW], expected, rtol=1e-4)
    for budget, there, here in (17, [17, 17, 17], [26, 17, 8]), (40, [53, 40, 27], [61, 40, 19]):
        _, kept = ranks_and_kept(PyramidKV(budget, window=WINDOW))
        assert [[len(head) for head in layer] for layer in kept] == [[n, n] for n in here]
        for index, n in enumerate(there):
            assert highest(ranks, n)[index] == kvpress_kept("PyramidKVPress", budget)[index]


def test_adakv_but_for_pooling_and_the_safeguard():
    """There a head is sure of its own best fifth of the budget, here of a fifth of the even share; max pooling here."""
    ranks, _ = ranks_and_kept(AdaKV(BUDGETS[0], window=WINDOW, kernel_size=5, pooling="avg"))
    expected = kvpress_scores("AdaKVPress")[..., :-WINDOW] * WINDOW * GROUP
    np.testing.assert_allclose(ranks[..., :-WINDOW], expected, rtol=1e-4)
    for budget in BUDGETS:
        for layer, kept in enumerate(kvpress_kept("AdaKVPress", budget)):
            both = ranks[layer].copy()
            for head, safe in enumerate(highest(ranks, budget // 5)[layer]):
                both[head, sorted(safe)] = np.inf
            [[chosen]] = highest(both.reshape(1, 1, -1), 2 * budget)  # head 1's keys follow head 0's
            assert kept == [{p % N_TOKENS for p in chosen if p // N_TOKENS == head} for head in (0, 1)]
