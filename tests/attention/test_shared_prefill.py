"""SharedPrefill: every cache that it fills is, bit for bit, what it is when fed alone."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cab_attention import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    EvictingCache,
    ExpectedAttention,
    Full,
    KeyDiff,
    KeyNorm,
    PyramidKV,
    Random,
    SharedPrefill,
    SnapKV,
    StreamingLLM,
)
from cab_attention.cache_layer import EvictingLayer
from cab_attention.kernels import dispatch
from cab_attention.kernels.flash_attention_accumulate import (
    flash_attention_with_cumulative_scores,
    flash_attention_with_several_scores,
)
from tests.all_methods import FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.feeding import feed, left_padded
from tests.feeding import tiny_model_with_key_gains as tiny_model
from tests.tiny_models import random_ids

N_PROMPT = 33
# What is shared does not hang on the budget: every method and variant at one, some at the others.
ALL = [make(9) for make in (METHODS | VARIANTS).values()]
ALL += [METHODS[name](budget) for name in ("h2o", "snapkv", "adakv", "cab") for budget in (1, 0.3, 500)]
ALL += [H2O(9, score_queries="every:4", granularity="layer", evict_every=2), H2O(0.3, score_queries="last:5")]
ALL += [CAB(9, block_size=4, score_queries="every:100"), TOVA(0.3, evict_every=2)]
FULL_ATTENTION = [make(9) for make in FULL_ATTENTION_VARIANTS.values()]
FULL_ATTENTION += [make(0.3, positions="compacted", granularity="layer") for make in (H2O, SnapKV, ExpectedAttention)]
FULL_ATTENTION += [PyramidKV(9, window=8, positions="compacted"), KeyNorm(9, granularity="model")]


def caches(model, methods=None, **options) -> list[EvictingCache]:
    slides = getattr(model.config, "sliding_window", None)
    methods = ALL + (FULL_ATTENTION if not slides else []) if methods is None else methods
    return [EvictingCache(model.config, method, **options) for method in methods]


def contents(cache: EvictingCache) -> list[tuple]:
    return [(layer.positions, layer.keys, layer.values, layer.scores, layer.seen) for layer in cache.layers]


def assert_same(cache: EvictingCache, alone: EvictingCache) -> None:
    for one, other in zip(contents(cache), contents(alone), strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert (cache.cache_bytes, cache.bookkeeping_bytes) == (alone.cache_bytes, alone.bookkeeping_bytes)
    assert [layer.budget_tokens for layer in cache.layers] == [layer.budget_tokens for layer in alone.layers]


@pytest.mark.parametrize(
    ("architecture", "padding", "compress_at", "attention"),
    [
        ("llama", (0,), None, "cab"),
        ("llama", (0, 6), 25, "cab"),
        ("llama", (0, 6), 25, "eager_with_scores"),
        ("mistral", (0,), None, "cab"),
        ("gemma3", (0, 9), None, "cab"),
        ("gemma3", (0, 9), None, "eager_with_scores"),
        ("gemma3", (0,), 27, "cab"),
    ],
)
def test_every_cache_is_what_it_is_alone(architecture, padding, compress_at, attention):
    model = tiny_model(architecture, attention)
    ids, mask = left_padded(*padding, n_tokens=N_PROMPT + 3)
    options = {} if compress_at is None else {"prompt_tokens": N_PROMPT, "compress_at": compress_at}
    end = compress_at or N_PROMPT
    together, alone = caches(model, **options), caches(model, **options)
    logits = feed(model, SharedPrefill(together), ids[:, :end], mask[:, :end])
    for cache, separate in zip(together, alone, strict=True):
        assert torch.equal(feed(model, separate, ids[:, :end], mask[:, :end]), logits)
        assert_same(cache, separate)
        stops = ([N_PROMPT] if compress_at else []) + [N_PROMPT + 1, N_PROMPT + 2, N_PROMPT + 3]
        for start, stop in zip([end, *stops], stops, strict=False):
            expected = feed(model, separate, ids[:, start:stop], mask[:, :stop])
            assert torch.equal(feed(model, cache, ids[:, start:stop], mask[:, :stop]), expected)
        assert_same(cache, separate)
        cache.check_saw(N_PROMPT + 3)


@pytest.mark.parametrize("n_tokens", [1, 17])
def test_short_prompts(n_tokens):
    model, ids = tiny_model("llama"), random_ids(1, n_tokens)
    together, alone = caches(model), caches(model)
    feed(model, SharedPrefill(together), ids)
    for cache, separate in zip(together, alone, strict=True):
        feed(model, separate, ids)
        assert_same(cache, separate)


@pytest.mark.parametrize("attention", ["cab", "eager_with_scores"])
def test_scores_do_not_change_the_output(attention, monkeypatch):
    """What the next layer gets is the first output computed: it must be that of every request."""
    model, outputs = tiny_model("llama", attention), {}
    attend = EvictingLayer.attend

    def remember(self, *args, **kwargs):
        output = attend(self, *args, **kwargs)
        outputs.setdefault(self.method, []).append(output)
        return output

    monkeypatch.setattr(EvictingLayer, "attend", remember)
    for cache in caches(model, [Full(), H2O(9), TOVA(9), SnapKV(9), SnapKV(9, window=5)]):
        feed(model, cache, random_ids(1, N_PROMPT))
    first, *others = outputs.values()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_each_request_is_computed_once(monkeypatch):
    model, requests = tiny_model("llama"), []
    attend = EvictingLayer.attend

    def counting(self, module, operator, *args, **kwargs):
        if not hasattr(operator, "operator"):
            raise AssertionError("fed alone")
        inner = operator.operator
        if getattr(inner, "counts", None) is None:

            def counted(*tensors, score_queries, score_step, **options):
                requests.append((score_queries, score_step))
                return inner(*tensors, score_queries=score_queries, score_step=score_step, **options)

            counted.counts = True
            operator.operator = counted
        return attend(self, module, operator, *args, **kwargs)

    monkeypatch.setattr(EvictingLayer, "attend", counting)
    methods = [Full(), Random(9), StreamingLLM(9), H2O("full"), H2O(9), H2O(5), TOVA(9), TOVA(5), SnapKV(9, window=8)]
    feed(model, SharedPrefill(caches(model, [*methods, SnapKV(9, window=100)])), random_ids(1, N_PROMPT))
    assert len(requests) == 3 * model.config.num_hidden_layers
    requests.clear()
    feed(model, SharedPrefill(caches(model, [Full(), Random(9), H2O("full")])), random_ids(1, N_PROMPT))
    assert requests == [(0, 1)] * model.config.num_hidden_layers
    requests.clear()
    methods = [H2O(9), H2O(5, score_queries="every:4"), CAB(9, score_queries="every:4"), H2O(9, score_queries="last:1")]
    methods += [TOVA(9), H2O(9, score_queries="last:8"), SnapKV(9, window=8), H2O(9, score_queries="every:2")]
    feed(model, SharedPrefill(caches(model, methods)), random_ids(1, N_PROMPT))
    assert [*sorted(requests, key=str)] == sorted([(None, 1), (None, 4), (None, 2), (1, 1), (8, 1)] * 3, key=str)


def test_one_call_of_the_operator_serves_all_requests(monkeypatch):
    model, calls = tiny_model("llama"), []
    several = "cab_attention.kernels.flash_attention_accumulate.attention_with_several_scores"
    operator = dispatch.attention_with_several_scores
    monkeypatch.setattr(several, lambda *args: calls.append(args[-2:]) or operator(*args))
    methods = [Full(), Random(9), H2O(9), H2O(5, score_queries="every:4"), TOVA(9), SnapKV(9, window=8), SnapKV(5)]
    feed(model, SharedPrefill(caches(model, methods)), random_ids(1, N_PROMPT))
    assert calls == [([33, 33, 1, 8, 32], [1, 4, 1, 1, 1])] * model.config.num_hidden_layers


def random_qkv(n_queries: int, n_keys: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, n_queries), (2, n_keys), (2, n_keys))
    ]


@pytest.mark.parametrize("options", [{}, {"per_kv_head": True, "softcap": 2.0}, {"sliding_window": 7, "scale": 0.3}])
def test_several_scores_are_those_of_separate_calls(options):
    q, k, v = random_qkv(21, 37)
    requests = [(21, 1), (500, 3), (5, 1), (1, 1), (0, 1)]
    output, scores = flash_attention_with_several_scores(q, k, v, requests, is_causal=True, **options)
    for (rows, step), of_rows in zip(requests, scores, strict=True):
        alone = flash_attention_with_cumulative_scores(
            q, k, v, is_causal=True, score_queries=rows, score_step=step, **options
        )
        assert torch.equal(output, alone[0])
        assert torch.equal(of_rows, alone[1])


def test_several_scores_refuse_what_one_call_refuses():
    q, k, v = random_qkv(3, 3)
    with pytest.raises(ValueError, match="score_step"):
        flash_attention_with_several_scores(q, k, v, [(3, 1), (3, 0)])
    with pytest.raises(ValueError, match="sliding_window"):
        flash_attention_with_several_scores(q, k, v, [(3, 1)], sliding_window=2)
    output, scores = flash_attention_with_several_scores(q.requires_grad_(), k, v, [(3, 1), (1, 1)])
    assert not any(of_rows.requires_grad for of_rows in scores)
    with pytest.raises(RuntimeError, match="no backward pass"):
        output.sum().backward()


class HostReads(TorchDispatchMode):
    """Counts what a GPU would be waited for: values read by the host or sent by it, and results of unknown size."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None] if name in ("index", "index_put_") else []
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh") or any(
            index.dtype == torch.bool for index in masks
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_gpu():
    """Then the cuts are queued while the GPU still computes what came before."""
    model = tiny_model("llama")
    methods = [make(budget) for make in METHODS.values() for budget in (9, 0.3)]
    methods += [H2O(9, granularity="model"), StreamingLLM(9, positions="compacted")]
    # Random draws on the host; the others' budgets are counted on the device.
    methods = [method for method in methods if not isinstance(method, (Random, AdaKV, PyramidKV))]
    with HostReads() as reads:
        feed(model, SharedPrefill(caches(model, methods)), random_ids(2, N_PROMPT))
    assert reads.found == ["_local_scalar_dense"]  # is there padding: once a forward
    with HostReads() as reads:  # what is counted is counted
        feed(model, SharedPrefill(caches(model, [AdaKV(9)])), random_ids(1, N_PROMPT))
    assert "nonzero" in reads.found


def test_what_does_not_hang_on_the_budget_is_computed_once(monkeypatch):
    model, computed = tiny_model("llama"), []
    order = CAB.block_order

    def counting(self, cached):
        computed.append(self)
        return order(self, cached)

    monkeypatch.setattr(CAB, "block_order", counting)
    methods = [CAB(budget, block_size=4) for budget in (9, 5, 0.3)] + [CAB(9, block_size=5), KeyDiff(5), KeyDiff(9)]
    together = caches(model, methods)
    feed(model, SharedPrefill(together), random_ids(1, N_PROMPT))
    assert len(computed) == 2 * model.config.num_hidden_layers
    assert all(layer.computed_once is None for cache in together for layer in cache.layers)
    feed(model, together[0], random_ids(1, 1))
    feed(model, together[1], random_ids(1, 1))
    assert len(computed) == 4 * model.config.num_hidden_layers


def test_each_cache_is_cut_before_the_next_layer_begins(monkeypatch):
    """Then the peak is one full layer, not all of them."""
    model, held = tiny_model("llama"), []
    together = caches(model, [H2O(9), SnapKV(9), TOVA(5)])
    update = SharedPrefill.update

    def watch(self, keys, values, layer_index, *args, **kwargs):
        held.append([cache.layers[i].keys.shape[2] for cache in together for i in range(layer_index)])
        return update(self, keys, values, layer_index, *args, **kwargs)

    monkeypatch.setattr(SharedPrefill, "update", watch)
    feed(model, SharedPrefill(together), random_ids(1, N_PROMPT))
    assert held == [[], [9, 9, 5], [9, 9, 9, 9, 5, 5]]


@pytest.mark.parametrize(
    ("second", "named"),
    [
        ({"prompt_tokens": 20}, "prompt_tokens, compress_at"),
        ({"prompt_tokens": N_PROMPT, "compress_at": 20}, "prompt_tokens, compress_at"),
    ],
)
def test_caches_of_other_prompts_are_refused(second, named):
    model = tiny_model("llama")
    one, other = (
        EvictingCache(model.config, H2O(9), prompt_tokens=N_PROMPT),
        EvictingCache(model.config, H2O(9), **second),
    )
    with pytest.raises(ValueError, match=named):
        SharedPrefill([one, other])


def test_what_does_not_belong_together_is_refused():
    model = tiny_model("llama")
    cache, used = caches(model, [H2O(9), H2O(9)])
    feed(model, used, random_ids(1, N_PROMPT))
    for wrong, named in (
        ([], "at least one"),
        ([cache, cache], "twice"),
        ([cache, used], "unused"),
        ([cache, EvictingCache(tiny_model("mistral").config, H2O(9))], "one model"),
    ):
        with pytest.raises(ValueError, match=named):
            SharedPrefill(wrong)


def test_a_second_forward_is_refused():
    model, ids = tiny_model("llama"), random_ids(1, N_PROMPT)
    for options in ({}, {"prompt_tokens": N_PROMPT}, {"prompt_tokens": N_PROMPT, "compress_at": 20}):
        shared = SharedPrefill(caches(model, [H2O(9), Full()], **options))
        end = options.get("compress_at", N_PROMPT)
        feed(model, shared, ids[:, :end])
        assert shared.get_seq_length() == end
        with pytest.raises(ValueError, match="one forward, and that is done"):
            feed(model, shared, ids[:, :1])


@pytest.mark.parametrize("n_tokens", [19, 21])
def test_a_forward_of_another_length_is_refused(n_tokens):
    model = tiny_model("llama")
    shared = SharedPrefill(caches(model, [H2O(9), Full()], prompt_tokens=N_PROMPT, compress_at=20))
    with pytest.raises(ValueError, match=f"takes the 20 tokens up to the cut in one forward, got {n_tokens}"):
        feed(model, shared, random_ids(1, n_tokens))


def test_a_model_whose_attention_never_comes_back():
    model = tiny_model("llama")
    together = caches(model, [H2O(9), Full()])
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        model(random_ids(1, N_PROMPT), past_key_values=SharedPrefill(together))
        with pytest.raises(RuntimeError, match="attention never came back"):
            model(random_ids(1, 1), past_key_values=together[0])


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["cab", "eager_with_scores"])
def test_on_a_gpu_every_cache_is_what_it_is_alone(attention):
    """In half precision and at a length that the prefill's kernels compute."""
    model = tiny_model("llama", attention).to("cuda", torch.bfloat16)
    ids, mask = random_ids(1, 403).cuda(), torch.ones(1, 403, dtype=torch.int64, device="cuda")
    methods = [make(40) for make in (METHODS | VARIANTS | FULL_ATTENTION_VARIANTS).values()] + [H2O(0.3), AdaKV(0.3)]
    together, alone = caches(model, methods), caches(model, methods)
    logits = feed(model, SharedPrefill(together), ids[:, :400], mask[:, :400])
    for cache, separate in zip(together, alone, strict=True):
        assert torch.equal(feed(model, separate, ids[:, :400], mask[:, :400]), logits)
        assert_same(cache, separate)
        for stop in (401, 402, 403):
            expected = feed(model, separate, ids[:, stop - 1 : stop], mask[:, :stop])
            assert torch.equal(feed(model, cache, ids[:, stop - 1 : stop], mask[:, :stop]), expected)
