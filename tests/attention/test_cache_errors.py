"""What EvictingCache cannot do, it says; and a model that leaves the cache aside is noticed."""

import pytest
import torch

from cab_attention import H2O, EvictingCache, Full, Random, SnapKV
from tests.feeding import feed
from tests.tiny_models import random_ids, tiny_model

N_PROMPT = 33


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize("method", [H2O(9), Full()])
def test_assisted_decoding(method, llama):
    cache = EvictingCache(llama.config, method)
    with pytest.raises(ValueError, match="evicted tokens do not come back"):
        llama.generate(random_ids(1, N_PROMPT), past_key_values=cache, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() <= N_PROMPT  # at once, not after half an answer


def test_crop(llama):
    cache = EvictingCache(llama.config, H2O(9))
    feed(llama, cache, random_ids(1, N_PROMPT))
    for croppable in (cache, cache.layers[0]):
        with pytest.raises(ValueError, match="evicted tokens do not come back"):
            croppable.crop(10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_with_another_implementation(attention):
    model = tiny_model("llama", attention)
    with pytest.raises(ValueError, match=rf"'cab', 'eager_with_scores'.*has '{attention}'"):
        EvictingCache(model.config, H2O(9))


@pytest.mark.parametrize("method", [H2O(9), Full()])
def test_a_model_whose_attention_never_comes_back(method, llama):
    cache = EvictingCache(llama.config, method)
    llama.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="attention never came back"):
        llama.generate(random_ids(1, N_PROMPT), past_key_values=cache, max_new_tokens=3)


def test_a_second_forward_of_several_tokens(llama):
    cache = EvictingCache(llama.config, H2O(9))
    ids = random_ids(1, 2 * N_PROMPT)
    feed(llama, cache, ids[:, :N_PROMPT])
    with pytest.raises(ValueError, match=r"2 tokens after the prompt of 33.*prompt_tokens"):
        feed(llama, cache, ids[:, N_PROMPT : N_PROMPT + 2])


def test_a_full_cache_may_be_fed_anyhow(llama):
    cache, ids = EvictingCache(llama.config, Full()), random_ids(1, 2 * N_PROMPT)
    pieces = torch.cat([feed(llama, cache, piece) for piece in ids.split([20, 30, 1, 15], 1)], 1)
    with torch.no_grad():
        assert (pieces - tiny_model("llama", "sdpa")(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize(("fed", "over"), [(0, "compress_at=25"), (20, "compress_at=25"), (25, "prompt_tokens=33")])
def test_a_forward_that_runs_over_a_boundary(fed, over, llama):
    cache, ids = EvictingCache(llama.config, SnapKV(9), prompt_tokens=33, compress_at=25), random_ids(1, 40)
    if fed:
        feed(llama, cache, ids[:, :fed])
    with pytest.raises(ValueError, match=f"runs over {over}"):
        feed(llama, cache, ids[:, fed:])


@pytest.mark.parametrize(
    "lengths",
    [
        {"prompt_tokens": 0},
        {"prompt_tokens": -3},
        {"compress_at": 5},
        {"prompt_tokens": 33, "compress_at": 0},
        {"prompt_tokens": 33, "compress_at": 34},
    ],
)
def test_prompt_lengths_that_make_no_sense(lengths, llama):
    with pytest.raises(ValueError, match="prompt_tokens"):
        EvictingCache(llama.config, H2O(9), **lengths)


@pytest.mark.parametrize("sample_ids", [["a", "b"], ["a", "b", "c", "d"]])
def test_wrong_number_of_sample_ids(sample_ids, llama):
    cache = EvictingCache(llama.config, Random(9), sample_ids=sample_ids)
    with pytest.raises(ValueError, match=f"{len(sample_ids)} sample ids for a batch of 3"):
        feed(llama, cache, random_ids(3, N_PROMPT))


def test_a_4d_mask(llama):
    cache = EvictingCache(llama.config, H2O(9))
    mask = torch.ones(1, 1, N_PROMPT, N_PROMPT, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="2D"):
        feed(llama, cache, random_ids(1, N_PROMPT), attention_mask=mask)


def test_output_attentions(llama):
    with pytest.raises(ValueError, match="output_attentions"):
        feed(llama, EvictingCache(llama.config, H2O(9)), random_ids(1, N_PROMPT), output_attentions=True)


@pytest.mark.parametrize("n_prompt", [18, 30])
def test_a_model_that_drops_the_cache(n_prompt):
    """Phi-3 goes on with a cache of its own beyond `original_max_position_embeddings`, and says nothing."""
    model = tiny_model("phi3", original_max_position_embeddings=20)
    cache = EvictingCache(model.config, H2O(9))
    generated = model.generate(random_ids(1, n_prompt), past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert generated.shape[1] == n_prompt + 6
    with pytest.raises(RuntimeError, match="did not use the EvictingCache"):
        cache.check_saw(n_prompt + 5)


def test_a_model_that_keeps_the_cache():
    model = tiny_model("phi3", original_max_position_embeddings=100)
    cache = EvictingCache(model.config, H2O(9))
    model.generate(random_ids(1, 30), past_key_values=cache, max_new_tokens=6, do_sample=False)
    cache.check_saw(35)
    for wrong in (36, 37):
        with pytest.raises(RuntimeError, match=rf"saw \[35\] tokens of {wrong}"):
            cache.check_saw(wrong)
