"""`evict_every`: decode steps from one cut to the next."""

import pytest

from cab_attention import CAB, H2O, TOVA, EvictingCache, KeyNorm, Random, SnapKV, StreamingLLM
from tests.feeding import feed
from tests.methods.bare_layers import N_PROMPT, assert_kept_as_brute_force, forward, layers_of, random_steps
from tests.tiny_models import random_ids, tiny_model

METHODS = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "tova": TOVA,
    "cab": lambda b, **o: CAB(b, block_size=4, **o),
    "cab median": lambda b, **o: CAB(b, bridge="median", **o),
}


@pytest.mark.parametrize("sliding_window", [None, 16])
@pytest.mark.parametrize("evict_every", [2, 3, 100])
@pytest.mark.parametrize("name", METHODS)
def test_kept_as_brute_force(name, evict_every, sliding_window):
    """Cumulative scores go on between cuts, TOVA's are those of the step that cuts."""
    method = METHODS[name](9, evict_every=evict_every)
    assert_kept_as_brute_force(method, random_steps(n_steps=10, seed=4), sliding_window)


@pytest.mark.parametrize("evict_every", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_how_many_keys_there_are(name, evict_every):
    """Exactly the budget after a cut, never more than budget + evict_every - 1, also from a short prompt on."""
    counts = {1: [9] * 9, 3: [9, 10, 11] * 3}[evict_every]
    from_short = {1: [6, 7, 8, *[9] * 6], 3: [6, 7, 8, 9, 10, 11, 9, 10, 11]}[evict_every]
    for n_prompt, expected in ((N_PROMPT, counts), (6, from_short)):
        layers = layers_of(METHODS[name](9, evict_every=evict_every))
        steps = random_steps(prompt=[n_prompt], n_steps=8)
        assert [{len(head) for head in forward(layers, *states)[0]} for states in steps] == [{n} for n in expected]


@pytest.mark.parametrize("name", METHODS)
def test_steps_count_from_the_end_of_the_prompt(name):
    """Also where a question, kept in full, follows the context that was compressed."""
    method = METHODS[name](9, evict_every=3)
    steps = [*random_steps(prompt=[30, 5, 2], n_steps=7, seed=5)]
    assert_kept_as_brute_force(method, steps, prompt_tokens=37, compress_at=30)
    layers = layers_of(method, prompt_tokens=37, compress_at=30)
    counts = [len(forward(layers, *states)[0][0]) for states in steps]
    assert counts == [9, 9 + 5, 9 + 7, 17, 18, 9 + 7, 17, 18, 9 + 7, 17]


def test_a_generation_stays_under_the_cap():
    model, held = tiny_model("llama"), []
    cache = EvictingCache(model.config, H2O(9, evict_every=4))
    ids = random_ids(1, 50)
    for start, stop in [(0, 33), *((i, i + 1) for i in range(33, 50))]:
        feed(model, cache, ids[:, start:stop])
        held.append([layer.keys.shape[2] for layer in cache.layers])
    assert held == [[n] * 3 for n in ([9, 10, 11, 12] * 5)[:18]]


@pytest.mark.parametrize("method", [Random, SnapKV, KeyNorm])
def test_methods_that_do_not_evict_in_decode_refuse_it(method):
    with pytest.raises(ValueError, match="evict_every=2, allowed is 1: it does not evict in decode"):
        method(9, evict_every=2)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "3"])
def test_what_is_no_number_of_steps_is_refused(wrong):
    with pytest.raises(ValueError, match=r"evict_every=.*, allowed is an integer >= 1"):
        H2O(9, evict_every=wrong)
