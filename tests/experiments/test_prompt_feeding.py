"""How a prompt is fed: what its last token, its question or its chunks change, and what they must not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cab_attention import H2O, AdaKV, EvictingCache, Full, PyramidKV, SharedPrefill, SnapKV, StreamingLLM
from experiments.longbench_qa import memory
from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.data import load_rows
from experiments.longbench_qa.greedy import GreedyDecoder
from experiments.longbench_qa.model_wrapper import Generation, ModelWrapper
from experiments.longbench_qa.prompts import FilledPrompt, fill_template, load_template
from tests.all_methods import METHODS
from tests.experiments.cells import MODEL, demo_cell


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL).load()


@pytest.fixture(scope="module")
def prompts() -> list[FilledPrompt]:
    template = load_template("demo_qa_512", None)
    return [fill_template(template, row.context, row.input) for row in load_rows("demo_qa_512", None, 12)]


def answer(model: ModelWrapper, prompt: FilledPrompt | str, method, **options: Any) -> tuple[Generation, list]:
    """The answer, and what the cache holds when decode begins."""
    held: list[torch.Tensor] = []

    def remember(cache: EvictingCache) -> None:
        held.extend(layer.positions.clone() for layer in cache.layers)

    options = {"max_new_tokens": 8, "sample_id": "s", "on_compressed": remember, **options}
    return model.load().generate(prompt, method, **options), held


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


# The first token.


def test_nothing_evicted_gives_the_same_first_token_from_either_cache(model: ModelWrapper, prompts):
    for prompt in prompts[:3]:
        full, _ = answer(model, prompt, Full())
        compressed, _ = answer(model, prompt, Full(), first_token="compressed")
        assert compressed.text == full.text
        assert (full.compressed_tokens, compressed.compressed_tokens) == (full.prompt_tokens, full.prompt_tokens - 1)


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_the_first_token_comes_from_the_cache_asked_for(model: ModelWrapper, prompts, monkeypatch, name: str):
    """Against logits made here, without the harness's own decoding."""
    method, torch_model, tokenizer = METHODS[name](6), model.load().loaded.model, model.loaded.tokenizer
    step, tokens, differ = GreedyDecoder.step, [], []

    def watched(*args, **kwargs):
        tokens.append(step(*args, **kwargs))
        return tokens[-1]

    monkeypatch.setattr(GreedyDecoder, "step", watched)
    for prompt in prompts[:4]:
        found = []
        for first_token in ("full", "compressed"):
            answer(model, prompt, method, max_new_tokens=1, first_token=first_token)
            found.append(tokens[-1][0])
        ids = tokenizer(prompt.text)["input_ids"]
        half = (MODEL.max_length - 1) // 2
        ids = torch.tensor([ids[:half] + ids[-half:]])
        uncut = torch_model(ids, past_key_values=EvictingCache(torch_model.config, Full())).logits[0, -1]
        cache = EvictingCache(torch_model.config, method, sample_ids="s")
        torch_model(ids[:, :-1], past_key_values=cache)
        cut = torch_model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        assert found == [uncut.argmax().item(), cut.argmax().item()]
        differ.append(found[0] != found[1])
    assert any(differ) == (name != "full")


@pytest.mark.parametrize("name", METHODS)
def test_after_the_context_the_first_token_comes_from_the_cut_cache_anyway(model: ModelWrapper, prompts, name: str):
    found = [
        answer(model, prompts[0], METHODS[name](16), compress="after_context", first_token=first_token)
        for first_token in ("full", "compressed")
    ]
    assert found[0][0].text == found[1][0].text
    assert found[0][0].compressed_tokens == found[1][0].compressed_tokens
    assert same(found[0][1], found[1][1])


def test_a_context_that_ends_the_prompt_is_compressed_but_for_its_last_token(model: ModelWrapper):
    text = "some context and nothing after it"
    prompt = FilledPrompt(text, 0, len(text))
    after_context, _ = answer(model, prompt, H2O(8), compress="after_context", first_token="compressed")
    after_prompt, _ = answer(model, prompt, H2O(8), first_token="compressed")
    assert after_context.text == after_prompt.text
    assert after_context.compressed_tokens == after_prompt.compressed_tokens == len(text) - 1


def test_a_prompt_of_one_token_leaves_nothing_to_compress(model: ModelWrapper):
    with pytest.raises(ValueError, match="first_token=compressed needs a prompt of 2 tokens or more, this one has 1"):
        answer(model, "x", H2O(8), first_token="compressed")
    assert answer(model, "xy", H2O(8), first_token="compressed")[0].compressed_tokens == 1


# What is recorded of the cut.


def test_what_is_kept_is_measured_right_after_the_cut(model: ModelWrapper, prompts):
    question = len(prompts[0].text[prompts[0].context_end :].encode())
    one_key = 2 * 4 * 4 * 16 * 4  # K and V, layers, KV heads, head dim, bytes
    for method, later in ((SnapKV(16), 1), (H2O(16), 0)):
        context, _ = answer(model, prompts[0], method, compress="after_context")
        assert (context.kept_tokens, context.kept_by_layer) == (16, [16] * 4)
        assert context.cache_bytes == (16 + question) * one_key
        last, _ = answer(model, prompts[0], method, first_token="compressed")
        assert (last.kept_tokens, last.kept_by_layer) == (16, [16] * 4)
        assert last.cache_bytes == (16 + later) * one_key  # H2O cuts again after the last token


def test_what_is_kept_is_known_by_layer(model: ModelWrapper, prompts):
    pyramid, held = answer(model, prompts[0], PyramidKV(32, window=8))
    assert pyramid.kept_by_layer == [(layer >= 0).sum().item() / 4 for layer in held]
    assert pyramid.kept_by_layer == sorted(pyramid.kept_by_layer, reverse=True) and len({*pyramid.kept_by_layer}) == 4
    assert pyramid.kept_tokens == 32
    by_head, _ = answer(model, prompts[0], AdaKV(32, window=8))
    assert by_head.kept_by_layer == [32] * 4


def test_answer_kept_is_measured_right_after_the_cut(model: ModelWrapper):
    prompt, method = "a" * 21 + "X" + "b" * 8, StreamingLLM(8, sinks=0)
    generation, held = answer(model, prompt, method, first_token="compressed", answers=["X"])
    assert generation.answer_kept == 1
    assert not any((positions == 21).any() for positions in held)  # the prompt's last token pushed it out


def test_the_prefill_is_both_what_is_cut_and_what_follows(model: ModelWrapper, prompts, monkeypatch):
    stretches = iter([(5.0, 300), (2.0, 400), (1.0, 100)])
    monkeypatch.setattr(memory.MemoryMeter, "stop", lambda self, started: next(stretches))
    generation, _ = answer(model, prompts[0], H2O(16), compress="after_context", max_new_tokens=2)
    assert (generation.prefill_ms, generation.prefill_peak_bytes) == (7, 400)
    assert (generation.decode_ms_per_token, generation.decode_peak_bytes) == (1, 100)
    assert memory.one_after_the_other((1.0, None), (2.0, None)) == (3, None)


# A prompt in chunks.


@pytest.mark.parametrize("compress", ["after_prompt", "after_context"])
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_in_chunks_keeps_what_one_in_one_forward_keeps(model: ModelWrapper, prompts, name: str, compress: str):
    method, prompt = METHODS[name](32), prompts[1]
    whole, whole_held = answer(model, prompt, method, compress=compress)
    for chunk in (23, 64, 1000):
        chunked, held = answer(model, prompt, method, compress=compress, prefill_chunk=chunk)
        assert same(held, whole_held)
        for key in ("text", "kept_by_layer", "compressed_tokens", "cache_bytes", "bookkeeping_bytes"):
            assert getattr(chunked, key) == getattr(whole, key)
        assert chunked.prefill_ms is not None and not chunked.prefill_shared


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [4, 4, 2]),
        ({"compress": "after_context"}, [4, 3, 3]),
        ({"first_token": "compressed"}, [4, 4, 1, 1]),
        ({"first_token": "compressed", "compress": "after_context"}, [4, 3, 3]),
        ({"prefill_chunk": 1}, [1] * 10),
        ({"prefill_chunk": 10}, [10]),
        ({"prefill_chunk": None}, [10]),
    ],
)
def test_a_chunk_ends_at_the_cut(model: ModelWrapper, monkeypatch, options: dict[str, Any], wanted: list[int]):
    forward, lengths = model.loaded.model.forward, []

    def counting(*args, input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model.loaded.model, "forward", counting)
    prompt = fill_template("{context}|{input}", "context", "q?")  # 7 tokens and 3
    answer(model, prompt, H2O(3), **{"max_new_tokens": 1, "prefill_chunk": 4, **options})
    assert lengths == wanted


@torch.inference_mode()
def test_a_method_can_cut_after_every_chunk(model: ModelWrapper, prompts):
    """As fed here by hand; another algorithm than the cut at the end."""
    method = H2O(32, evict_in_prefill="chunk")
    chunked, held = answer(model, prompts[0], method, prefill_chunk=64)
    assert chunked.kept_by_layer == [32] * 4
    _, held_at_end = answer(model, prompts[0], H2O(32), prefill_chunk=64)
    assert not same(held, held_at_end)
    torch_model, ids = model.loaded.model, model.loaded.tokenizer(prompts[0].text)["input_ids"]
    half = (MODEL.max_length - 8) // 2
    ids = torch.tensor([ids[:half] + ids[-half:]])
    cache = EvictingCache(torch_model.config, method, prompt_tokens=2 * half)
    for chunk in ids.split(64, dim=1):
        torch_model(chunk, past_key_values=cache)
        assert all(layer.keys.shape[2] == 32 for layer in cache.layers)
    assert same(held, [layer.positions for layer in cache.layers])


def test_prompts_in_chunks_are_not_shared(model: ModelWrapper, prompts, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SharedPrefill, "__init__", lambda *args: pytest.fail("a chunk is not shared"))
    methods = [H2O(16), SnapKV(16), Full()]
    found = model.load().generate_each(prompts[0], methods, max_new_tokens=4, prefill_chunk=50)
    alone = [model.generate(prompts[0], method, max_new_tokens=4) for method in methods]
    for generation, expected in zip(found, alone, strict=True):
        assert isinstance(generation, Generation)
        assert generation.text == expected.text
        assert not generation.prefill_shared


def test_eager_attention_has_to_fit_a_chunk_only(tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    cell = demo_cell(tmp_path, attention="eager", prefill_chunk=74)  # a fourth of the prompt
    one = 8 * 14  # heads, and what eager attention takes of memory for a weight
    # What is cut after every chunk never holds more than the budget and a chunk.
    for method, n_keys in ((H2O(32), 4 * 74), (H2O(32, evict_in_prefill="chunk"), 32 + 74)):
        for missing, n_finished in ((0, 3), (1, 0)):
            free = 74 * n_keys * one - missing
            monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
            metrics = run_cell(replace(cell, output_dir=str(tmp_path / str(missing)), method=method), model)
            assert (metrics["n"], metrics["n_failed"]) == (n_finished, 3 - n_finished)
