"""EvictingCache under transformers' generation modes, and what it refuses."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

from cab_attention import H2O, EvictingCache, Full
from tests.all_methods import EVICTING, METHODS
from tests.feeding import feed, left_padded
from tests.feeding import tiny_model_with_key_gains as tiny_model
from tests.tiny_models import random_ids

N_PROMPT = 33


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def generate(model, cache, ids, mask=None, n_new=8, **options) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    tokens = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n_new, **{"do_sample": False, **options}
    )
    return tokens[:, ids.shape[1] :]


def positions(cache) -> list:
    return [layer.positions.tolist() for layer in cache.layers]


@pytest.mark.parametrize("name", EVICTING)
def test_greedy_is_the_argmax_step_by_step(name, llama):
    ids = random_ids(1, N_PROMPT)
    cache, by_hand = (EvictingCache(llama.config, METHODS[name](9)) for _ in range(2))
    generated = generate(llama, cache, ids)
    token, tokens = feed(llama, by_hand, ids)[:, -1:].argmax(-1), []
    for _ in range(8):
        tokens.append(int(token))
        token = feed(llama, by_hand, token)[:, -1:].argmax(-1) if len(tokens) < 8 else token
    assert generated[0].tolist() == tokens
    assert positions(cache) == positions(by_hand)
    cache.check_saw(N_PROMPT + 7)
    assert cache.get_seq_length() == N_PROMPT + 7


@pytest.mark.parametrize("name", EVICTING)
def test_both_implementations_generate_the_same(name, llama):
    ids, mask = left_padded(0, 6, n_tokens=N_PROMPT)
    eager = tiny_model("llama", "eager_with_scores")
    one, other = (EvictingCache(model.config, METHODS[name](0.3)) for model in (llama, eager))
    assert torch.equal(generate(llama, one, ids, mask), generate(eager, other, ids, mask))
    assert positions(one) == positions(other)


def test_eviction_changes_the_text(llama):
    """Else the comparisons here would compare nothing."""
    ids = random_ids(4, N_PROMPT)
    full = generate(llama, EvictingCache(llama.config, Full()), ids, n_new=12)
    for name in EVICTING:
        assert not torch.equal(generate(llama, EvictingCache(llama.config, METHODS[name](9)), ids, n_new=12), full)


def test_sampling(llama):
    ids, mask = left_padded(0, 6, n_tokens=N_PROMPT)

    def sample(model, cache, seed):
        torch.manual_seed(seed)
        return generate(model, cache, ids, mask, do_sample=True, temperature=0.8, top_k=20).tolist()

    def h2o():
        return EvictingCache(llama.config, H2O(9))

    assert sample(llama, h2o(), 0) == sample(llama, h2o(), 0) != sample(llama, h2o(), 1)
    assert sample(llama, EvictingCache(llama.config, Full()), 0) == sample(tiny_model("llama", "sdpa"), None, 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_left_padded_row_says_what_it_says_alone(name, architecture):
    model = tiny_model(architecture)
    ids, mask = left_padded(0, 6, 11, n_tokens=N_PROMPT)
    together = generate(model, EvictingCache(model.config, METHODS[name](0.4)), ids, mask)
    for row, padding in enumerate((0, 6, 11)):
        alone = generate(model, EvictingCache(model.config, METHODS[name](0.4)), ids[row : row + 1, padding:])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_beams_over_a_full_budget_are_sdpas(architecture):
    ids, mask = left_padded(0, 6, n_tokens=N_PROMPT)
    model = tiny_model(architecture)
    plain = generate(tiny_model(architecture, "sdpa"), None, ids, mask, num_beams=3)
    assert torch.equal(generate(model, EvictingCache(model.config, H2O("full")), ids, mask, num_beams=3), plain)
    assert not torch.equal(plain, generate(model, EvictingCache(model.config, Full()), ids, mask))  # beams matter


@pytest.mark.parametrize("name", EVICTING)
def test_beams_of_a_row_do_not_depend_on_the_batch(name, llama):
    ids, mask = left_padded(0, 6, n_tokens=N_PROMPT)
    together = generate(llama, EvictingCache(llama.config, METHODS[name](0.4)), ids, mask, num_beams=3)
    for row, padding in enumerate((0, 6)):
        cache = EvictingCache(llama.config, METHODS[name](0.4))
        assert torch.equal(generate(llama, cache, ids[row : row + 1, padding:], num_beams=3)[0], together[row])
        assert all(len(layer.positions) == 3 for layer in cache.layers)


@pytest.mark.parametrize("name", EVICTING)
def test_reordered_rows_go_on_as_themselves(name, llama):
    ids, mask = left_padded(0, 6, 3, n_tokens=N_PROMPT + 3)
    cache = EvictingCache(llama.config, METHODS[name](0.4))
    feed(llama, cache, ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    reordered, order = copy.deepcopy(cache), torch.tensor([2, 0, 0, 1])
    reordered.batch_select_indices(order)
    for stop in range(N_PROMPT + 1, N_PROMPT + 4):
        logits = feed(llama, cache, ids[:, stop - 1 : stop], mask[:, :stop])
        moved = feed(llama, reordered, ids[order, stop - 1 : stop], mask[order, :stop])
        assert (moved - logits[order]).abs().max() < 1e-5
        assert [layer.positions[order].tolist() for layer in cache.layers] == positions(reordered)


@pytest.mark.parametrize(("architecture", "padding"), [("llama", (0, 9)), ("mistral", (0,)), ("gemma3", (0, 9))])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_in_chunks_is_one_pass(name, architecture, padding):
    model = tiny_model(architecture)
    ids, mask = left_padded(*padding, n_tokens=N_PROMPT + 3)
    whole = EvictingCache(model.config, METHODS[name](9))
    chunked = EvictingCache(model.config, METHODS[name](9), prompt_tokens=N_PROMPT)
    expected = feed(model, whole, ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    for start in range(0, N_PROMPT, 7):
        stop = min(start + 7, N_PROMPT)
        logits = feed(model, chunked, ids[:, start:stop], mask[:, :stop])
    for stop in range(N_PROMPT, N_PROMPT + 4):
        assert (logits[:, -1] - expected[:, -1]).abs().max() < 1e-4
        for one, other in zip(whole.layers, chunked.layers, strict=True):
            assert [[p for p in head if p >= 0] for row in one.positions.tolist() for head in row] == [
                [p for p in head if p >= 0] for row in other.positions.tolist() for head in row
            ]
            assert name == "full" or one.positions.shape == other.positions.shape
            assert name in ("full", "pyramidkv", "adakv") or one.positions.shape[2] <= 9 + 3
        if stop < N_PROMPT + 3:
            expected = feed(model, whole, ids[:, stop : stop + 1], mask[:, : stop + 1])
            logits = feed(model, chunked, ids[:, stop : stop + 1], mask[:, : stop + 1])


def test_nothing_is_cut_before_the_last_chunk(llama):
    cache = EvictingCache(llama.config, H2O(9), prompt_tokens=21)
    ids, counts = random_ids(1, 22), []
    for piece in ids.split([7, 7, 7, 1], dim=1):
        feed(llama, cache, piece)
        counts.append(cache.layers[0].positions.shape[2])
    assert counts == [7, 14, 9, 9]


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="older versions feed the whole prompt again"
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("name", METHODS)
def test_generate_with_prefill_chunk_size(name, architecture):
    model, ids = tiny_model(architecture), random_ids(1, N_PROMPT)
    whole = EvictingCache(model.config, METHODS[name](9))
    chunked = EvictingCache(model.config, METHODS[name](9), prompt_tokens=N_PROMPT)
    tokens = generate(model, chunked, ids, prefill_chunk_size=7)
    assert torch.equal(tokens, generate(model, whole, ids))
    assert positions(chunked) == positions(whole)


@pytest.mark.parametrize("padding", [(0,), (0, 5)])
@pytest.mark.parametrize("name", EVICTING)
def test_a_context_is_compressed_and_the_rest_of_the_prompt_kept(name, padding, llama):
    ids, mask = left_padded(*padding, n_tokens=N_PROMPT)
    alone = EvictingCache(llama.config, METHODS[name](9))
    feed(llama, alone, ids[:, :25], mask[:, :25])
    cache = EvictingCache(llama.config, METHODS[name](9), prompt_tokens=N_PROMPT, compress_at=25)
    for start, stop in [(0, 25), (25, 30), (30, N_PROMPT)]:
        feed(llama, cache, ids[:, start:stop], mask[:, :stop])
        for one, other in zip(alone.layers, cache.layers, strict=True):
            rest = torch.arange(25, stop).expand(*one.positions.shape[:2], -1)
            assert torch.equal(other.positions, torch.cat([one.positions, rest], -1))
    feed(llama, cache, ids[:, :1], torch.cat([mask, mask[:, -1:]], 1))
    grown = 8 + (0 if cache.method.evicts_in_decode else 1)
    for one, other in zip(alone.layers, cache.layers, strict=True):
        assert other.positions.shape[2] == one.positions.shape[2] + grown


@pytest.mark.parametrize("budget", [9, 500])
@pytest.mark.parametrize("name", METHODS)
def test_a_sliding_layer_holds_less_than_its_window(name, budget):
    """Window 24: the next query sees 23 keys and itself."""
    model = tiny_model("gemma3")
    cache = EvictingCache(model.config, METHODS[name](budget))
    ids, mask = left_padded(0, 5, n_tokens=N_PROMPT + 15)
    for start, stop in [(0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, N_PROMPT + 15))]:
        feed(model, cache, ids[:, start:stop], mask[:, :stop])
        for layer in (cache.layers[0], cache.layers[2]):
            assert layer.keys.shape[2] <= 23
            assert layer.positions.where(layer.positions >= 0, stop).min() >= stop - 23
    if budget == 500 or name == "full":
        assert cache.layers[0].keys.shape[2] == 23
        assert cache.layers[1].keys.shape[2] == N_PROMPT + 15


@pytest.mark.parametrize("name", EVICTING)
def test_a_copy_goes_on_identically(name, llama):
    ids = random_ids(2, N_PROMPT + 4)
    cache = EvictingCache(llama.config, METHODS[name](9))
    feed(llama, cache, ids[:, :N_PROMPT])
    copied = copy.deepcopy(cache)
    before = positions(cache)
    for step in range(N_PROMPT, N_PROMPT + 4):
        logits = feed(llama, copied, ids[:, step : step + 1])
        if step == N_PROMPT:
            assert positions(cache) == before != positions(copied)  # the copy is one of its own
    for step in range(N_PROMPT, N_PROMPT + 4):
        expected = feed(llama, cache, ids[:, step : step + 1])
    assert torch.equal(logits, expected)
    assert positions(cache) == positions(copied)


@pytest.mark.parametrize("name", EVICTING)
def test_reset_forgets_everything(name, llama):
    """Also how long the first prompt was, and its budget."""
    cache, fresh = (EvictingCache(llama.config, METHODS[name](0.3)) for _ in range(2))
    generate(llama, cache, random_ids(2, N_PROMPT))
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.cache_bytes == 0 and cache.bookkeeping_bytes == 0
    for n_tokens in (20, 41):
        ids = random_ids(1, n_tokens, seed=3)
        assert torch.equal(generate(llama, cache, ids), generate(llama, fresh, ids))
        assert positions(cache) == positions(fresh)
        cache.reset()
        fresh = EvictingCache(llama.config, METHODS[name](0.3))
