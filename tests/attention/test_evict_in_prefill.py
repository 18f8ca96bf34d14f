"""`evict_in_prefill`: a prompt in chunks is cut after the last one, or after each."""

import pytest
import torch

from cab_attention import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    EvictingCache,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from tests.all_methods import FULL_ATTENTION_VARIANTS, VARIANTS
from tests.feeding import feed, left_padded
from tests.methods.bare_layers import N_PROMPT, assert_kept_as_brute_force, forward, layers_of, random_steps
from tests.methods.distinct_tokens import left_padded_distinct
from tests.tiny_models import random_ids, tiny_model

CHUNKS = [13, 1, 9, 14]
METHODS = {
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "h2o every 4": lambda b, **o: H2O(b, score_queries="every:4", **o),
    "tova": TOVA,
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "cab": lambda b, **o: CAB(b, block_size=2, **o),
}


@pytest.mark.parametrize("budget", [2, 12, 0.4])
@pytest.mark.parametrize("name", METHODS)
def test_cut_after_each_chunk_as_brute_force(name, budget):
    """A fraction is of the whole prompt from the first chunk on."""
    method = METHODS[name](budget, evict_in_prefill="chunk")
    assert_kept_as_brute_force(method, random_steps(prompt=CHUNKS, n_steps=4), prompt_tokens=N_PROMPT)


@pytest.mark.parametrize("name", METHODS)
def test_in_sliding_layers(name):
    method = METHODS[name](11, evict_in_prefill="chunk")
    steps = random_steps(prompt=CHUNKS, n_steps=4, seed=1)
    assert_kept_as_brute_force(method, steps, sliding_window=16, prompt_tokens=N_PROMPT)


@pytest.mark.parametrize("name", METHODS)
def test_a_question_after_the_context_is_not_cut(name):
    method = METHODS[name](8, evict_in_prefill="chunk")
    steps = [*random_steps(prompt=[10, 10, 10, 4, 3], n_steps=3, seed=2)]
    assert_kept_as_brute_force(method, steps, prompt_tokens=37, compress_at=30)
    layers = layers_of(method, prompt_tokens=37, compress_at=30)
    assert [len(forward(layers, *states)[0][0]) for states in steps[:5]] == [8, 8, 8, 12, 15]


@pytest.mark.parametrize("name", METHODS)
def test_cutting_each_chunk_is_another_algorithm(name):
    """But with one chunk the same. By position (StreamingLLM) or by keys alone (key_norm) chunks change nothing."""
    steps = [*random_steps(prompt=CHUNKS, n_steps=0)]
    whole = [*random_steps(n_steps=0)]
    kept = {}
    for when in ("end", "chunk"):
        for how, pieces in (("chunks", steps), ("whole", whole)):
            layers = layers_of(METHODS[name](6, evict_in_prefill=when), prompt_tokens=N_PROMPT)
            kept[when, how] = [forward(layers, *states) for states in pieces][-1]
    assert kept["end", "whole"] == kept["chunk", "whole"]
    assert (kept["end", "chunks"] == kept["chunk", "chunks"]) == (name in ("streaming_llm", "key_norm"))


@pytest.mark.parametrize("name", VARIANTS | FULL_ATTENTION_VARIANTS)
def test_cut_at_the_end_it_is_one_pass(name):
    model, make = tiny_model("llama"), (VARIANTS | FULL_ATTENTION_VARIANTS)[name]
    ids, mask = left_padded(0, 9, n_tokens=36)
    whole, chunked = EvictingCache(model.config, make(9)), EvictingCache(model.config, make(9), prompt_tokens=33)
    expected = feed(model, whole, ids[:, :33], mask[:, :33])
    for start, stop in [(0, 7), (7, 14), (14, 20), (20, 33)]:
        logits = feed(model, chunked, ids[:, start:stop], mask[:, :stop])
    for stop in (34, 35, 36):
        assert (logits[:, -1] - expected[:, -1]).abs().max() < 1e-4
        for one, other in zip(whole.layers, chunked.layers, strict=True):
            assert torch.equal(one.positions, other.positions)
        expected = feed(model, whole, ids[:, stop - 1 : stop], mask[:, :stop])
        logits = feed(model, chunked, ids[:, stop - 1 : stop], mask[:, :stop])


@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_never_takes_more_than_the_budget_and_a_chunk(name):
    model, held = tiny_model("llama"), []
    cache = EvictingCache(model.config, METHODS[name](9, evict_in_prefill="chunk"), prompt_tokens=33)
    for chunk in random_ids(2, 33).split(7, dim=1):
        feed(model, cache, chunk)
        held.append([layer.keys.shape[2] for layer in cache.layers])
    assert held == [[7] * 3, *[[9] * 3] * 4]
    cache.check_saw(33)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_whose_first_chunk_is_padding_is_cut_as_alone(name):
    """What padding is still to come is no part of its budget in the end."""
    model, method = tiny_model("llama"), METHODS[name](0.5, evict_in_prefill="chunk")
    ids, mask = left_padded_distinct(0, 9, n_tokens=33)
    batch, alone = (EvictingCache(model.config, method, prompt_tokens=n) for n in (33, 24))
    for start, stop in [(0, 7), (7, 14), (14, 21), (21, 33)]:
        feed(model, batch, ids[:, start:stop], mask[:, :stop])
        if stop > 9:
            feed(model, alone, ids[1:, max(9, start) : stop])
            for one, other in zip(batch.layers, alone.layers, strict=True):
                in_batch = [[p - 9 for p in head if p >= 0] for head in one.positions[1].tolist()]
                assert in_batch == other.positions[0].tolist()
    assert all(layer.budget_tokens == [17, 12] for layer in batch.layers)


@pytest.mark.parametrize("method", [SnapKV, PyramidKV, AdaKV, Random])
def test_methods_that_need_the_whole_prompt_refuse_it(method):
    with pytest.raises(ValueError, match="evict_in_prefill='chunk', allowed is 'end'"):
        method(9, evict_in_prefill="chunk")


def test_anything_else_is_refused():
    with pytest.raises(ValueError, match="evict_in_prefill='each', allowed is 'end' or 'chunk'"):
        H2O(9, evict_in_prefill="each")
