"""`score_queries`: which queries make H2O's and CAB's cumulative scores."""

import pytest

from cab_attention import CAB, H2O, KeyNorm
from tests.methods.bare_layers import N_PROMPT, assert_kept_as_brute_force, forward, layers_of, random_steps

METHODS = {
    "h2o": H2O,
    "cab": lambda b, **o: CAB(b, block_size=4, **o),
    "cab median": lambda b, **o: CAB(b, bridge="median", **o),
}
PIECES = {"one pass": [N_PROMPT], "chunks": [13, 1, 2, 20, 1]}


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("score_queries", ["last:1", "last:5", "last:100", "every:2", "every:5", "every:100"])
@pytest.mark.parametrize("name", METHODS)
def test_kept_as_brute_force(name, score_queries, pieces):
    """Steps count back from the prompt's last query, whatever the chunks, and on through decode."""
    method = METHODS[name](20, score_queries=score_queries)
    assert_kept_as_brute_force(method, random_steps(prompt=PIECES[pieces], n_steps=11), prompt_tokens=N_PROMPT)


@pytest.mark.parametrize("score_queries", ["last:5", "every:4"])
def test_of_a_compressed_context(score_queries):
    """They count back from its end; the question's queries, in chunks too, count as decode's do."""
    steps = random_steps(prompt=[21, 5, 1, 6, 2], n_steps=9, seed=1)
    assert_kept_as_brute_force(H2O(8, score_queries=score_queries), steps, prompt_tokens=35, compress_at=26)


@pytest.mark.parametrize("score_queries", ["last:5", "last:20", "every:4"])
@pytest.mark.parametrize("pieces", PIECES)
def test_in_sliding_layers(score_queries, pieces):
    """Keys that have left the window are held until the queries that saw them are scored."""
    steps = random_steps(prompt=PIECES[pieces], n_steps=9, seed=2)
    method, last_piece = H2O(8, score_queries=score_queries), len(PIECES[pieces]) - 1
    assert_kept_as_brute_force(method, steps, 16, first_compared=last_piece, prompt_tokens=N_PROMPT)


@pytest.mark.parametrize("few", ["every:1", f"last:{N_PROMPT}"])
def test_every_query_counted_is_all(few):
    kept = []
    for score_queries in ("all", few):
        layers = layers_of(H2O(9, score_queries=score_queries))
        kept.append([forward(layers, *states) for states in random_steps()])
        (scores,) = (layer.scores for layer in layers)
        assert scores.sum() > 0
    assert kept[0] == kept[1]


def test_fewer_queries_choose_other_keys():
    kept = []
    for score_queries in ("all", "last:5", "every:5"):
        (states,) = random_steps(n_steps=0)
        kept.append(str(forward(layers_of(H2O(20, score_queries=score_queries)), *states)))
    assert len({*kept}) == 3


WRONG = ["", "some", "all:1", "last", "last:", "last:0", "last:-1", "every:0", "every:1.5", "every: 2", "every:²", "5"]


@pytest.mark.parametrize("wrong", [*WRONG, 5, None])
def test_anything_else_is_refused(wrong):
    with pytest.raises(ValueError, match=r"score_queries=.*, allowed is 'all', 'last:W' or 'every:S'"):
        H2O(9, score_queries=wrong)


def test_the_last_queries_are_not_known_while_chunks_are_cut():
    for method in (H2O, CAB):
        with pytest.raises(ValueError, match="score_queries='last:5' with evict_in_prefill='chunk'"):
            method(9, score_queries="last:5", evict_in_prefill="chunk")
        method(9, score_queries="every:5", evict_in_prefill="chunk")


def test_only_methods_that_sum_over_queries_have_the_option():
    with pytest.raises(TypeError):
        KeyNorm(9, score_queries="all")
