"""What evicted keys held is free at once, and so is what a method observed."""

import gc
import weakref

import pytest
import torch

from cab_attention import EvictingCache, Full
from tests.all_methods import EVICTING, FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.feeding import feed, left_padded
from tests.tiny_models import random_ids, tiny_model

N_PROMPT = 33
ALL = METHODS | VARIANTS | FULL_ATTENTION_VARIANTS


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def storages(held: object, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every storage that tensors in `held` keep alive, by address: of a view all that it is a view of."""
    if isinstance(held, torch.Tensor):
        found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    elif isinstance(held, (list, tuple, dict)):
        for part in held.values() if isinstance(held, dict) else held:
            storages(part, found)
    elif type(held).__module__.startswith("cab_attention."):
        storages(vars(held), found)
    return found


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float32), ("phi3", torch.bfloat16), ("gemma3", torch.float32)]
)
@pytest.mark.parametrize("name", EVICTING)
def test_evicted_keys_free_their_memory(name, architecture, dtype):
    """Where heads keep different numbers of keys, storage is that of the keys there are; in a sliding layer it is that
    of the longest head."""
    model, per_key = tiny_model(architecture).to(dtype), 2 * 16 * dtype.itemsize  # K and V, dim
    cache = EvictingCache(model.config, METHODS[name](8))
    ids, mask = left_padded(0, 3, n_tokens=N_PROMPT + 3)
    for n_decoded in range(4):
        new = slice(N_PROMPT + n_decoded - 1 if n_decoded else 0, N_PROMPT + n_decoded)
        feed(model, cache, ids[:, new], mask[:, : new.stop])
        if n_decoded == 0:
            counts = [(layer.positions >= 0).sum(-1) for layer in cache.layers]  # [rows, KV heads]
            held = [
                int(count.sum()) if layer.sliding_window is None else int(count.max()) * count.numel()
                for count, layer in zip(counts, cache.layers, strict=True)
            ]
            assert sum(held) == 3 * 4 * 8 or (name, architecture) == ("adakv", "gemma3")
        grown = 0 if cache.method.evicts_in_decode else 4 * n_decoded
        assert [layer.cache_bytes for layer in cache.layers] == [per_key * (n + grown) for n in held]
        assert cache.cache_bytes == sum(layer.cache_bytes for layer in cache.layers)
        for layer, n in zip(cache.layers, held, strict=True):
            # Positions and scores; and where heads differ, for each key and value its slot and row.
            assert layer.bookkeeping_bytes <= layer.positions.numel() * (8 + 4) + (2 * 16 * n if name == "adakv" else 0)
            a_few_numbers = 200
            assert sum(storages(layer, {}).values()) <= layer.cache_bytes + layer.bookkeeping_bytes + a_few_numbers


def test_a_full_cache_holds_no_larger_tensor_alive():
    """Phi-3 cuts its keys out of one fused projection."""
    model = tiny_model("phi3")
    cache = EvictingCache(model.config, Full())
    feed(model, cache, *left_padded(0, n_tokens=N_PROMPT))
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes == N_PROMPT * 2 * 16 * 4
        assert layer.values.untyped_storage().nbytes() == layer.values.nbytes


@pytest.fixture
def no_garbage_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("name", ["h2o", "snapkv", "expected_attention", "h2o_all_options"])
def test_the_full_keys_are_gone_at_once(name, llama, no_garbage_collection):
    """And the queries' covariance [B, H, 16, 16] once it has done its work."""
    cache = EvictingCache(llama.config, ALL[name](8))
    feed(llama, cache, *left_padded(0, 7, 2, n_tokens=N_PROMPT))
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.ndim == 4]
    assert not [x for x in tensors if x.shape[2] == N_PROMPT or x.shape[2:] == (16, 16)]


@pytest.mark.parametrize("name", ["full", "h2o", "h2o_all_options"])
def test_a_cache_let_go_is_gone_at_once(name, llama, no_garbage_collection):
    cache = EvictingCache(llama.config, ALL[name](8))
    ids = random_ids(1, N_PROMPT + 1)
    feed(llama, cache, ids[:, :N_PROMPT])
    feed(llama, cache, ids[:, N_PROMPT:])
    keys = [weakref.ref(layer.keys) for layer in cache.layers]
    assert all(reference() is not None for reference in keys)
    del cache
    assert all(reference() is None for reference in keys)
