"""What holds for every method, on tiny models, after the prompt and through decode."""

import copy
import math
from itertools import combinations

import numpy as np
import pytest
import torch

from cab_attention import EvictingCache, Full, PyramidKV, Random
from tests.all_methods import EVICTING, FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.feeding import feed, left_padded
from tests.methods.distinct_tokens import left_padded_distinct
from tests.tiny_models import random_ids, tiny_model

N_PROMPT, PADDING = 33, (0, 7, 2)
GROWS_IN_DECODE = {"random", "snapkv", "pyramidkv", "adakv", "key_norm", "key_diff", "expected_attention"}
VARIES = {"pyramidkv": 0, "adakv": 1}  # the budget is the mean over layers, over the heads of a layer
ALL = METHODS | VARIANTS | FULL_ATTENTION_VARIANTS


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def decode(model, cache, ids, mask, n_steps):
    """Prompt, then `n_steps` tokens; yields the number of tokens decoded after each forward."""
    n_prompt = ids.shape[1] - n_steps
    feed(model, cache, ids[:, :n_prompt], mask[:, :n_prompt])
    yield 0
    for step in range(n_prompt, ids.shape[1]):
        feed(model, cache, ids[:, step : step + 1], mask[:, : step + 1])
        yield step + 1 - n_prompt


def kept(cache: EvictingCache, row: int = 0, padding: int = 0) -> list[list[list[int]]]:
    """Positions by layer and head, from the first real token."""
    return [[[p - padding for p in head if p >= 0] for head in layer.positions[row].tolist()] for layer in cache.layers]


@pytest.mark.parametrize("budget", [1, 9, 28, N_PROMPT, 100, 0.01, 0.3])
@pytest.mark.parametrize("name", EVICTING)
def test_as_many_keys_as_the_budget(name, budget, llama):
    """Of the prompt exactly min(budget, n) by layer, head and row; after an eviction in decode never more."""
    cache = EvictingCache(llama.config, METHODS[name](budget))
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT + 4)
    for n_decoded in decode(llama, cache, ids, mask, 4):
        for row, padding in enumerate(PADDING):
            n = N_PROMPT - padding
            b = budget if isinstance(budget, int) else max(1, math.floor(budget * n + 0.5))
            expected = min(b, n) + n_decoded if name in GROWS_IN_DECODE else min(b, n + n_decoded)
            counts = np.array([[len(head) for head in layer] for layer in kept(cache, row, padding)])
            if name in VARIES:
                counts = counts.mean(VARIES[name])
            assert (counts == expected).all(), (n_decoded, row)
        for layer in cache.layers:
            for row, padding in enumerate(PADDING):
                for positions in layer.positions[row].tolist():
                    real = [p for p in positions if p >= 0]
                    assert positions == [-1] * (len(positions) - len(real)) + sorted(set(real))
                    assert not real or (padding <= real[0] and real[-1] < N_PROMPT + n_decoded)
            assert layer.keys.shape[2] == layer.values.shape[2] == layer.positions.shape[2]
            # the longest head says how many slots there are
            assert (layer.positions >= 0).flatten(0, 1).any(dim=0).all()


def test_budgets_vary_by_layer_and_by_head(llama):
    """Else their means, above, would say nothing."""
    counts = {}
    for name in VARIES:
        cache = EvictingCache(llama.config, METHODS[name](9))
        feed(llama, cache, *left_padded(0, n_tokens=N_PROMPT))
        counts[name] = [[len(head) for head in layer] for layer in kept(cache)]
    assert counts["pyramidkv"] == [[12, 12], [9, 9], [6, 6]]  # of the 5 beside the window 7.5, 5 and 2.5
    assert any(one != other for one, other in counts["adakv"])


@pytest.mark.parametrize("name", EVICTING)
def test_a_fraction_is_of_each_rows_real_tokens(name, llama):
    cache = EvictingCache(llama.config, METHODS[name](0.5))
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT)
    feed(llama, cache, ids, mask)
    assert all(layer.budget_tokens == [17, 13, 16] for layer in cache.layers)  # of 33, 26, 31


@pytest.mark.parametrize(
    ("name", "architecture"),
    [(name, "llama") for name in ALL if name != "full"] + [(name, "mistral") for name in [*EVICTING, *VARIANTS]],
)
def test_a_row_keeps_in_a_batch_what_it_keeps_alone(name, architecture):
    model, ids_of_rows = tiny_model(architecture), ["a", "b", "c"]
    ids, mask = left_padded_distinct(*PADDING, n_tokens=N_PROMPT + 4)
    batch = EvictingCache(model.config, ALL[name](0.3), sample_ids=ids_of_rows)
    alone = [EvictingCache(model.config, ALL[name](0.3), sample_ids=sample) for sample in ids_of_rows]
    runs = [decode(model, batch, ids, mask, 4)]
    for row, padding in enumerate(PADDING):
        runs.append(decode(model, alone[row], ids[row : row + 1, padding:], mask[row : row + 1, padding:], 4))
    for _ in zip(*runs, strict=True):
        for row, padding in enumerate(PADDING):
            assert kept(batch, row, padding) == kept(alone[row])
    assert kept(batch, 0) != kept(batch, 2)


@pytest.mark.parametrize("name", VARIANTS | FULL_ATTENTION_VARIANTS)
def test_a_copy_with_other_rows_goes_on_by_itself(name, llama):
    """Beams are reordered, repeated and dropped, and a copy cuts its own layers."""
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT + 4)
    cache, order = EvictingCache(llama.config, ALL[name](9)), torch.tensor([2, 0, 0, 1])
    feed(llama, cache, ids[:, :N_PROMPT], mask[:, :N_PROMPT])
    copied = copy.deepcopy(cache)
    copied.batch_select_indices(order)
    for stop in range(N_PROMPT + 1, N_PROMPT + 5):
        logits = feed(llama, copied, ids[order, stop - 1 : stop], mask[order, :stop])
        expected = feed(llama, cache, ids[:, stop - 1 : stop], mask[:, :stop])[order]
        assert (logits - expected).abs().max() < 1e-5
        for one, other in zip(cache.layers, copied.layers, strict=True):
            assert torch.equal(one.positions[order], other.positions)


@pytest.mark.parametrize("name", VARIANTS | FULL_ATTENTION_VARIANTS)
def test_both_implementations_generate_the_same(name, llama):
    ids, mask = left_padded_distinct(*PADDING, n_tokens=N_PROMPT)
    eager, results = tiny_model("llama", "eager_with_scores"), []
    for model in (llama, eager):
        cache = EvictingCache(model.config, ALL[name](9))
        options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, num_beams=2)
        results.append((model.generate(ids, past_key_values=cache, **options).tolist(), kept(cache)))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", [name for name in ALL if name != "full"])
def test_heads_and_layers_choose_for_themselves(name, llama):
    """Except by position (StreamingLLM), over the heads of a layer (TOVA), or where it is asked for."""
    cache = EvictingCache(llama.config, ALL[name](9))
    feed(llama, cache, *left_padded(0, n_tokens=N_PROMPT))
    by_position, together = name.startswith("streaming_llm"), cache.method.granularity != "head"
    assert together == (name.startswith("tova") or name.endswith(("_layer", "_model", "_all_options")))
    for layer in kept(cache):
        assert len({str(head) for head in layer}) == (1 if by_position or together else 2)
    by_model = cache.method.granularity == "model"
    assert (len({str(layer) for layer in kept(cache)}) == 1) == (by_position or by_model)


def test_methods_choose_differently(llama):
    chosen = {}
    for name in EVICTING:
        cache = EvictingCache(llama.config, METHODS[name](21))
        feed(llama, cache, *left_padded(0, n_tokens=N_PROMPT))
        chosen[name] = kept(cache)
    for one, other in combinations(EVICTING, 2):
        assert chosen[one] != chosen[other], (one, other)


@pytest.mark.parametrize(("name", "budget"), [*((name, "full") for name in METHODS), *((name, 500) for name in ALL)])
def test_a_full_budget_generates_what_sdpa_does(name, budget, llama):
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT)
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    cache = EvictingCache(llama.config, ALL[name](budget))
    generated = llama.generate(ids, past_key_values=cache, **options)
    assert torch.equal(generated, tiny_model("llama", "sdpa").generate(ids, **options))
    cache.check_saw(N_PROMPT + 7)
    assert kept(cache, 1, 7) == [[[*range(N_PROMPT)]] * 2] * 3


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "gemma3", "phi3", "gpt2"])
def test_the_full_method_generates_what_sdpa_does(architecture):
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT)
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    model = tiny_model(architecture)
    generated = model.generate(ids, past_key_values=EvictingCache(model.config, Full()), **options)
    assert torch.equal(generated, tiny_model(architecture, "sdpa").generate(ids, **options))


def random_choice(model, ids, mask, sample_ids, row=0, padding=0, seed=0):
    cache = EvictingCache(model.config, Random(9, seed=seed), sample_ids=sample_ids)
    feed(model, cache, ids, mask)
    return kept(cache, row, padding)


def test_random_is_drawn_by_seed_sample_layer_and_head(llama):
    ids, mask = left_padded(0, n_tokens=N_PROMPT)
    first = random_choice(llama, ids, mask, "x")
    assert first == random_choice(llama, ids, mask, "x")  # a resumed run
    assert first == random_choice(llama, random_ids(1, N_PROMPT, seed=9), mask, "x")  # whatever the tokens
    others = [random_choice(llama, ids, mask, "y"), random_choice(llama, ids, mask, "x", seed=1)]
    assert first not in others and others[0] != others[1]
    heads = [str(head) for layer in first for head in layer]
    assert len(set(heads)) == 6
    assert all(head[-1] == N_PROMPT - 1 for layer in first for head in layer)


def test_random_does_not_depend_on_the_batch(llama):
    ids, mask = left_padded(*PADDING, n_tokens=N_PROMPT)
    samples = ["x", "y", "z"]
    for row, padding in enumerate(PADDING):
        alone = random_choice(llama, ids[row : row + 1, padding:], mask[row : row + 1, padding:], samples[row])
        assert alone == random_choice(llama, ids, mask, samples, row, padding)
        back = random_choice(llama, ids.flip(0), mask.flip(0), samples[::-1], 2 - row, padding)
        assert alone == back


def test_random_is_uniform_but_for_the_last_token():
    """10 000 draws of 2 from 5: the last always, each other one in four."""
    counts = torch.zeros(5)
    model = tiny_model("llama", num_hidden_layers=1)
    ids = random_ids(1, 5).expand(1000, -1)
    for seed in range(5):
        cache = EvictingCache(model.config, Random(2, seed=seed), sample_ids=[str(row) for row in range(1000)])
        feed(model, cache, ids, torch.ones_like(ids))
        counts += cache.layers[0].positions.flatten().bincount(minlength=5)
    assert counts[4] == 10_000
    assert (counts[:4] - 2500).abs().max() < 200  # 4.6 standard deviations


@pytest.mark.parametrize("budget", [5, 11, 22, 40])
@pytest.mark.parametrize("slides", ["fss", "ssf", "sfs", "ffs"])
def test_pyramidkv_is_exact_over_the_layers_of_a_kind(slides, budget):
    kinds = {"f": "full_attention", "s": "sliding_attention"}
    model = tiny_model("gemma3", layer_types=[kinds[kind] for kind in slides])
    cache = EvictingCache(model.config, PyramidKV(budget, window=4))
    feed(model, cache, *left_padded(0, n_tokens=60))
    for kind, most in (("f", budget), ("s", min(budget, 23))):
        sizes = [layer.positions.shape[2] for layer, own in zip(cache.layers, slides, strict=True) if own == kind]
        assert sum(sizes) == most * len(sizes)
        assert sizes == sorted(sizes, reverse=True)
