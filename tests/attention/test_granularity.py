"""`granularity`: each KV head, each layer or the whole model chooses one set of keys."""

import pytest
import torch

from cab_attention import CAB, H2O, TOVA, EvictingCache, ExpectedAttention, KeyDiff, KeyNorm, PyramidKV, SnapKV
from tests.all_methods import METHODS
from tests.feeding import feed, left_padded
from tests.methods.bare_layers import N_PROMPT, assert_kept_as_brute_force, forward, layers_of, random_steps
from tests.tiny_models import random_ids, tiny_model

OF_LAYER_OR_MODEL = {
    "h2o": H2O,
    "snapkv": lambda b, **o: SnapKV(b, window=8, **o),
    "snapkv max 7": lambda b, **o: SnapKV(b, window=8, kernel_size=7, pooling="max", **o),
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "cab": lambda b, **o: CAB(b, block_size=4, **o),
    "cab redundancy": lambda b, **o: CAB(b, block_size=4, bridge="redundancy", redundancy=1.0, **o),
    "cab median": lambda b, **o: CAB(b, bridge="median", **o),
}
OF_LAYER = OF_LAYER_OR_MODEL | {"pyramidkv": lambda b, **o: PyramidKV(b, window=8, beta=3, **o)}


def make(name, budget, granularity):
    return OF_LAYER[name](budget, granularity=granularity)


@pytest.mark.parametrize("budget", [1, 20, N_PROMPT - 1])
@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, "layer") for name in OF_LAYER] + [(name, "model") for name in OF_LAYER_OR_MODEL],
)
def test_kept_as_brute_force(name, granularity, budget):
    """Scores are summed; CAB's graph is over the keys of a set side by side."""
    assert_kept_as_brute_force(make(name, budget, granularity), random_steps(n_layers=3, n_steps=4))


@pytest.mark.parametrize("name", OF_LAYER)
def test_a_layer_with_a_sliding_window(name):
    assert_kept_as_brute_force(make(name, 11, "layer"), random_steps(n_layers=2, n_steps=6, seed=1), sliding_window=16)


@pytest.mark.parametrize("name", OF_LAYER)
def test_one_head_is_a_layer_and_one_layer_a_model(name):
    """With MQA; and the sets that heads, a layer and a model choose do differ otherwise."""
    kept = {}
    for n_kv_heads, n_layers in ((1, 1), (2, 2)):
        for granularity in ("head", "layer", "model")[: 3 if name in OF_LAYER_OR_MODEL else 2]:
            (states,) = random_steps(4, n_kv_heads, prompt=[61], n_steps=0, n_layers=n_layers)
            layers = layers_of(make(name, 28, granularity), n_layers)
            kept[n_kv_heads, granularity] = str(forward(layers, *states))
    assert len({kept[1, granularity] for n_heads, granularity in kept if n_heads == 1}) == 1
    assert len({*kept.values()}) == len(kept) // 2 + 1


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("name", OF_LAYER_OR_MODEL)
def test_one_set_in_a_model(name, granularity):
    """Rows of a padded batch each have their own, all heads of a layer or of the model the same, through decode."""
    model = tiny_model("llama")
    cache = EvictingCache(model.config, make(name, 9, granularity))
    ids, mask = left_padded(0, 6, n_tokens=36)
    for start, stop in [(0, 33), (33, 34), (34, 35), (35, 36)]:
        feed(model, cache, ids[:, start:stop], mask[:, :stop])
        positions = torch.stack([layer.positions for layer in cache.layers])
        assert (positions == positions[:, :, :1]).all()
        assert (positions[0] == positions[1:]).all() == (granularity == "model")
        grown = 0 if cache.method.evicts_in_decode else stop - 33
        assert ((positions >= 0).sum(-1) == 9 + grown).all()
        assert not torch.equal(positions[:, 0], positions[:, 1])


def test_a_model_is_cut_when_its_last_layer_is_done(monkeypatch):
    model, held = tiny_model("llama"), []
    cache = EvictingCache(model.config, H2O(9, granularity="model"))
    update = EvictingCache.update

    def watch(self, keys, values, layer_index, *args, **kwargs):
        held.append([layer.positions.shape[2] for layer in self.layers[:layer_index]])
        return update(self, keys, values, layer_index, *args, **kwargs)

    monkeypatch.setattr(EvictingCache, "update", watch)
    ids = random_ids(1, 34)
    feed(model, cache, ids[:, :33])
    feed(model, cache, ids[:, 33:])
    assert held == [[], [33], [33, 33], [], [10], [10, 10]]
    assert [layer.positions.shape[2] for layer in cache.layers] == [9, 9, 9]


@pytest.mark.parametrize("name", ["random", "streaming_llm", "adakv"])
@pytest.mark.parametrize("granularity", ["layer", "model", "token"])
def test_methods_whose_heads_choose_for_themselves_refuse_others(name, granularity):
    with pytest.raises(ValueError, match=f"granularity='{granularity}', allowed is 'head'"):
        type(METHODS[name](9))(9, granularity=granularity)


@pytest.mark.parametrize(("method", "granularity"), [(TOVA, "head"), (TOVA, "model"), (PyramidKV, "model")])
def test_what_makes_no_sense_is_refused(method, granularity):
    with pytest.raises(ValueError, match=f"granularity='{granularity}', allowed is .*'layer'"):
        method(9, granularity=granularity)


@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_a_model_with_sliding_layers_cannot_choose_one_set(architecture):
    with pytest.raises(ValueError, match="granularity='model' needs full attention in every layer"):
        EvictingCache(tiny_model(architecture).config, H2O(9, granularity="model"))
