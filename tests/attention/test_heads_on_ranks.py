"""The heads of a layer on several ranks: what is kept is what one process keeps. Threads stand in for processes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import pytest
import torch
from transformers import LlamaConfig
from transformers.utils import is_accelerate_available

from cab_attention import CAB, AdaKV, EvictingCache, ExpectedAttention, KeyDiff, KeyNorm, PyramidKV, SnapKV
from cab_attention import attention as attention_file
from cab_attention import cache_layer as cache_layer_file
from cab_attention.tensor_parallel import HeadRanks, check_heads_divide
from tests.all_methods import EVICTING, FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.methods.bare_layers import forward, layers_of, random_steps

SETS = {
    "cab_layer": lambda b: CAB(b, block_size=4, granularity="layer"),
    "cab_redundancy_model": lambda b: CAB(b, block_size=4, bridge="redundancy", granularity="model"),
    "cab_median_layer": lambda b: CAB(b, bridge="median", granularity="layer"),
    "key_diff_model": lambda b: KeyDiff(b, granularity="model"),
    "key_norm_layer": lambda b: KeyNorm(b, granularity="layer"),
    "expected_attention_model": lambda b: ExpectedAttention(b, granularity="model"),
    "pyramidkv_layer": lambda b: PyramidKV(b, window=8, beta=3, granularity="layer"),
    "snapkv_layer": lambda b: SnapKV(b, window=8, granularity="layer"),
}
ALL = {name: METHODS[name] for name in EVICTING} | VARIANTS | FULL_ATTENTION_VARIANTS | SETS


class Board:
    """Where the ranks of one run leave their parts for each other."""

    def __init__(self, size):
        self.barrier, self.parts = threading.Barrier(size, timeout=60), [None] * size


class ThreadRanks(HeadRanks):
    def gather(self, own, dim=1):
        board = self.group
        board.parts[self.rank] = own
        board.barrier.wait()
        whole = torch.cat(board.parts, dim)
        board.barrier.wait()
        return whole


@pytest.fixture
def kept_on_ranks(monkeypatch):
    """A function of a method, steps and a number of ranks: after each step what each layer and head keeps."""
    here = threading.local()
    monkeypatch.setattr(cache_layer_file, "ranks_of", lambda module, n_kv_heads: getattr(here, "ranks", None))

    def run(method, steps, size, **options):
        board = Board(size)

        def one_rank(rank):
            here.ranks = ThreadRanks(board, rank, size) if size > 1 else None
            n_layers = steps[0][1].shape[0]
            layers = layers_of(method, n_layers, **options)
            share = [tuple(x.reshape(n_layers, size, -1, *x.shape[2:])[:, rank] for x in states) for states in steps]
            return [(forward(layers, *states), [layer.cache_bytes for layer in layers]) for states in share]

        with ThreadPoolExecutor(size) as pool:
            ranks = list(pool.map(one_rank, range(size)))
        steps_of_ranks = list(zip(*ranks, strict=True))
        kept = [
            [list(chain(*heads)) for heads in zip(*(part for part, _ in step), strict=True)] for step in steps_of_ranks
        ]
        n_bytes = [[sum(held) for held in zip(*(part for _, part in step), strict=True)] for step in steps_of_ranks]
        return kept, n_bytes

    return run


@pytest.mark.parametrize("name", ALL)
def test_kept_keys_and_their_bytes(name, kept_on_ranks):
    """To the bit: the ranks' queries, keys and values are one process's."""
    steps = list(random_steps(n_heads=8, n_kv_heads=4, n_steps=4, n_layers=2))
    alone = kept_on_ranks(ALL[name](12), steps, 1)
    assert len({len(head) for layer in alone[0][-1] for head in layer} - {len(steps) + 36}) >= 1  # something was cut
    for size in (2, 4):
        assert kept_on_ranks(ALL[name](12), steps, size) == alone


def test_heads_that_do_not_meet_choose_otherwise(kept_on_ranks):
    """The test above can fail: the first two of four heads, with nothing known of the others, keep other keys."""
    steps = list(random_steps(n_heads=8, n_kv_heads=4, n_steps=2, n_layers=2))
    first_half = [(q[:, :4], k[:, :2], v[:, :2]) for q, k, v in steps]
    for name in ("h2o_layer", "cab_model", "adakv", "tova"):
        alone, _ = kept_on_ranks(ALL[name](12), steps, 1)
        kept, _ = kept_on_ranks(ALL[name](12), first_half, 1)
        assert kept != [[layer[:2] for layer in step] for step in alone], name


def test_a_layer_with_a_sliding_window(kept_on_ranks):
    steps = list(random_steps(n_heads=8, n_kv_heads=4, n_steps=6, n_layers=2, seed=1))
    for name in ("adakv", "h2o_layer", "cab_layer", "tova"):
        alone = kept_on_ranks(ALL[name](9), steps, 1, sliding_window=16)
        assert kept_on_ranks(ALL[name](9), steps, 2, sliding_window=16)[0] == alone[0]


def test_after_context_and_in_chunks(kept_on_ranks):
    """A part of the prompt that follows the cut; a prompt in pieces with a cut after each."""
    steps = list(random_steps(n_heads=8, n_kv_heads=4, prompt=[30, 7], n_layers=2))
    prompt = dict(prompt_tokens=37, compress_at=30)
    for method in (AdaKV(9, window=4), METHODS["tova"](9), SETS["cab_layer"](9)):
        assert kept_on_ranks(method, steps, 2, **prompt) == kept_on_ranks(method, steps, 1, **prompt)
    in_chunks = replace(VARIANTS["h2o_layer"](9), evict_in_prefill="chunk")
    prompt = dict(prompt_tokens=37)
    assert kept_on_ranks(in_chunks, steps, 2, **prompt) == kept_on_ranks(in_chunks, steps, 1, **prompt)


def test_heads_that_do_not_divide():
    config = LlamaConfig(hidden_size=96, num_attention_heads=12, num_key_value_heads=4, attn_implementation="cab")
    check_heads_divide(config, 4)
    for n_ranks, wrong in ((8, "12 attention heads"), (3, "4 KV heads: .* 1, 2, 4$")):
        with pytest.raises(ValueError, match=wrong):
            check_heads_divide(config, n_ranks)
    config.distributed_config = type("Config", (), {"tp_size": 3})
    with pytest.raises(ValueError, match="over 3 ranks, llama has 4 KV heads"):
        EvictingCache(config, KeyNorm(8))


def test_spreading_a_model_needs_accelerate(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_file, "is_accelerate_available", lambda: False)
    for option in ("device_map", "distributed_config"):
        with pytest.raises(ValueError, match=rf"^{option} needs the package accelerate: pip install .*\[multi-gpu\]'$"):
            attention_file.load_model_with_attention(str(tmp_path), "cab", **{option: "auto"})


@pytest.mark.skipif(not is_accelerate_available(), reason="needs accelerate")
def test_one_place_for_a_model(tmp_path):
    with pytest.raises(ValueError, match="device=cpu and device_map both say where"):
        attention_file.load_model_with_attention(str(tmp_path), "cab", device="cpu", device_map="auto")
