from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cab_attention import (
    H2O,
    EvictingCache,
    FlashAttentionWithAccumulation,
    flash_attention_with_cumulative_scores,
    get_all_cumulative_scores,
    replace_attention_with_flash,
)
from tests.tiny_models import ARCHITECTURES, random_ids, tiny_model

PROMPT, NEW = 40, 6  # longer than the sliding windows of 24
SEEN = PROMPT + NEW - 1  # the last new token is never an input


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, **options)


def eager_scores(architecture: str, ids: Tensor, **inputs: Tensor) -> list[Tensor]:
    """Scores [B, H, K] of each layer: the column sums of eager's own weights over one forward of all the text."""
    with torch.no_grad():
        weights = tiny_model(architecture, "eager")(ids, output_attentions=True, **inputs).attentions
    if "attention_mask" in inputs:  # a row of padding is not a query
        weights = [layer * inputs["attention_mask"][:, None, :, None] for layer in weights]
    assert len(weights) == 3
    return [layer.sum(2) for layer in weights]


def assert_scores(model: PreTrainedModel, expected: list[Tensor]) -> None:
    recorded = list(get_all_cumulative_scores(model).values())
    assert len(recorded) == len(expected)
    for ours, wanted in zip(recorded, expected, strict=True):
        assert ours.dtype == torch.float32 and wanted.std() > 0.1
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loaded_with", ["eager", "sdpa", "cab"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_tokens_and_the_scores_of_eager(architecture: str, loaded_with: str) -> None:
    ids = random_ids(2, PROMPT)
    model = tiny_model(architecture, loaded_with)
    before = generate(model, ids)
    assert replace_attention_with_flash(model) is model
    assert get_all_cumulative_scores(model) == {}
    after = generate(model, ids)
    assert after.shape == (2, PROMPT + NEW) and torch.equal(after, before)

    scores = get_all_cumulative_scores(model)
    assert [name.split(".")[-2] for name in scores] == ["0", "1", "2"]
    assert all(model.get_submodule(name).get_cumulative_scores() is value for name, value in scores.items())
    assert all(value.shape == (2, 4, SEEN) for value in scores.values())
    assert_scores(model, eager_scores(architecture, after[:, :SEEN]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padded_batch(architecture: str) -> None:
    ids, pad = random_ids(2, PROMPT), 9
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    ids = ids * mask
    expected = generate(tiny_model(architecture, "eager"), ids, attention_mask=mask)
    model = replace_attention_with_flash(tiny_model(architecture, "sdpa"))
    text = generate(model, ids, attention_mask=mask)
    assert torch.equal(text, expected)
    alone = generate(tiny_model(architecture, "eager"), ids[:1, pad:])
    assert torch.equal(text[0, pad:], alone[0])

    mask = torch.cat([mask, mask.new_ones(2, NEW - 1)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert_scores(model, eager_scores(architecture, text[:, :SEEN], attention_mask=mask, position_ids=positions))
    for scores in get_all_cumulative_scores(model).values():
        assert torch.equal(scores[0, :, :pad], torch.zeros(4, pad))
        torch.testing.assert_close(scores.sum(-1), mask.sum(1, keepdim=True).float().expand(2, 4))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_prompt_in_chunks_and_decode_by_hand(architecture: str) -> None:
    ids = random_ids(2, PROMPT)
    model = replace_attention_with_flash(tiny_model(architecture))
    cache, start = None, 0
    for stop in (7, 33, 34, PROMPT):
        with torch.no_grad():
            cache = model(ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
        start = stop
    assert_scores(model, eager_scores(architecture, ids))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_scores_restart_at_a_new_prompt(architecture: str) -> None:
    model = replace_attention_with_flash(tiny_model(architecture))
    for n_batch, n_tokens, seed in ((2, PROMPT, 0), (2, PROMPT, 1), (2, 9, 2), (1, 50, 3), (1, 1, 4)):
        text = generate(model, random_ids(n_batch, n_tokens, seed))
        assert_scores(model, eager_scores(architecture, text[:, :-1]))


def test_reset_scores() -> None:
    model = replace_attention_with_flash(tiny_model("llama"))
    generate(model, random_ids(1, PROMPT))
    first, *others = get_all_cumulative_scores(model)
    model.get_submodule(first).reset_scores()
    assert model.get_submodule(first).get_cumulative_scores() is None
    assert list(get_all_cumulative_scores(model)) == others
    generate(model, random_ids(1, PROMPT))
    assert list(get_all_cumulative_scores(model)) == [first, *others]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_module_filter_only_chooses_who_records(architecture: str) -> None:
    ids = random_ids(1, PROMPT)
    expected = generate(tiny_model(architecture, "sdpa"), ids)
    asked: list[str] = []

    def middle(name: str, module: nn.Module) -> bool:
        assert hasattr(module, "layer_idx") and not isinstance(module, FlashAttentionWithAccumulation)
        asked.append(name)
        return module.layer_idx == 1

    model = replace_attention_with_flash(tiny_model(architecture, "sdpa"), middle)
    text = generate(model, ids)
    assert torch.equal(text, expected)
    assert len(asked) == 3 and list(get_all_cumulative_scores(model)) == [asked[1]]
    assert_scores(model, eager_scores(architecture, text[:, :SEEN])[1:2])
    assert model.config._attn_implementation == "cab"  # those that record nothing run the same attention

    silent = replace_attention_with_flash(tiny_model(architecture, "eager"), lambda name, module: False)
    assert torch.equal(generate(silent, ids), expected) and get_all_cumulative_scores(silent) == {}


def test_replacing_twice_changes_nothing() -> None:
    ids, model = random_ids(1, PROMPT), tiny_model("llama")
    replace_attention_with_flash(replace_attention_with_flash(model))
    assert sum(isinstance(module, FlashAttentionWithAccumulation) for module in model.modules()) == 3
    text = generate(model, ids)
    assert_scores(model, eager_scores("llama", text[:, :SEEN]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrapping_one_module_by_hand(architecture: str) -> None:
    ids = random_ids(1, PROMPT)
    model = tiny_model(architecture, "sdpa")
    expected = generate(model, ids)
    names = [name for name, module in model.named_modules() if name.endswith(("self_attn", ".attn"))]
    parent, _, child = names[2].rpartition(".")
    original = model.get_submodule(names[2])
    wrapped = FlashAttentionWithAccumulation(original)
    setattr(model.get_submodule(parent), child, wrapped)
    assert wrapped.get_cumulative_scores() is None and wrapped.layer_idx == 2
    text = generate(model, ids)
    assert torch.equal(text, expected)
    assert list(get_all_cumulative_scores(model)) == [names[2]]
    assert_scores(model, eager_scores(architecture, text[:, :SEEN])[2:])


def test_wrapped_module_returns_what_the_original_does() -> None:
    model = tiny_model("llama", "cab")
    attention, hidden = model.model.layers[0].self_attn, torch.randn(2, 9, 64)
    rotary = model.model.rotary_emb(hidden, torch.arange(9)[None])
    expected, _ = attention(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)
    wrapped = FlashAttentionWithAccumulation(attention)
    output, nothing = wrapped(hidden_states=hidden, position_embeddings=rotary, attention_mask=None)
    assert nothing is None and torch.equal(output, expected)
    torch.testing.assert_close(wrapped.get_cumulative_scores().sum(-1), torch.full((2, 4), 9.0))
    silent = FlashAttentionWithAccumulation(attention, accumulate_scores=False)
    assert torch.equal(silent(hidden, rotary, None)[0], expected) and silent.get_cumulative_scores() is None


def test_raw_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 16, generator=generator) for heads in (4, 2, 2))
    module = FlashAttentionWithAccumulation()
    assert module.get_cumulative_scores() is None
    for _ in range(2):  # the second prompt starts anew
        outputs = [module(q[:, :, :9], k[:, :, :9], v[:, :, :9], is_causal=True)]
        outputs += [module(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], is_causal=True) for i in (9, 10, 11)]
        expected, scores = flash_attention_with_cumulative_scores(q, k, v, is_causal=True)
        assert all(nothing is None for _, nothing in outputs)
        torch.testing.assert_close(torch.cat([output for output, _ in outputs], 2), expected)
        torch.testing.assert_close(module.get_cumulative_scores(), scores)
    bidirectional, _ = module(query=q, key=k, value=v, scale=0.1)
    wanted = flash_attention_with_cumulative_scores(q, k, v, scale=0.1)
    assert torch.equal(bidirectional, wanted[0]) and torch.equal(module.get_cumulative_scores(), wanted[1])
    module.reset_scores()
    assert module.get_cumulative_scores() is None
    silent = FlashAttentionWithAccumulation(accumulate_scores=False)
    assert torch.equal(silent(q, k, v, is_causal=True)[0], expected) and silent.get_cumulative_scores() is None


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear"):
        FlashAttentionWithAccumulation(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="Sequential"):
        replace_attention_with_flash(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_recording_twice_is_refused() -> None:
    model = replace_attention_with_flash(tiny_model("llama"))
    with pytest.raises(ValueError, match="EvictingCache"):
        generate(model, random_ids(1, PROMPT), past_key_values=EvictingCache(model.config, H2O(8)))


def test_a_missing_attribute_is_an_attribute_error() -> None:
    for module in (
        FlashAttentionWithAccumulation(),
        FlashAttentionWithAccumulation(tiny_model("llama").model.layers[0].self_attn),
    ):
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = module.no_such_thing
