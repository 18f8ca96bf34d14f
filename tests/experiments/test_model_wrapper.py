import pytest
import torch

from cab_attention import H2O, EvictingCache, Full, Random, SnapKV, StreamingLLM
from experiments.longbench_qa.data import load_rows
from experiments.longbench_qa.model_wrapper import Generation, ModelWrapper
from experiments.longbench_qa.models import LoadedModel, byte_tokenizer
from experiments.longbench_qa.prompts import FilledPrompt, fill_template, load_template
from experiments.longbench_qa.schema import ModelConfig
from tests.all_methods import EVICTING, METHODS
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def wrapper() -> ModelWrapper:
    return ModelWrapper(ModelConfig(name="tiny", kind="tiny", max_length=400)).load()


@pytest.fixture(scope="module")
def filled() -> FilledPrompt:
    row = load_rows("demo_qa_512", None, 1)[0]
    return fill_template(load_template("demo_qa", None), row.context, row.input)


def answer(wrapper: ModelWrapper, prompt: FilledPrompt | str, method, **options) -> tuple[Generation, list]:
    kept: list[torch.Tensor] = []

    def remember(cache: EvictingCache) -> None:
        kept.extend(layer.positions.clone() for layer in cache.layers)

    options = {"max_new_tokens": 8, "sample_id": "s", **options}
    return wrapper.generate(prompt, method, on_compressed=remember, **options), kept


@pytest.mark.parametrize("name", EVICTING)
def test_cab_and_eager_keep_the_same_keys(wrapper: ModelWrapper, filled: FilledPrompt, name: str):
    method = METHODS[name](48)
    ours, our_keys = answer(wrapper.load(), filled, method)
    eager, eager_keys = answer(wrapper.load("eager"), filled, method)
    same = [(a == b).double().mean().item() for a, b in zip(our_keys, eager_keys, strict=True)]
    assert sum(same) / len(same) >= 0.999
    assert ours.text == eager.text
    assert ours.kept_tokens == eager.kept_tokens == 48


def test_full_cache_answers_as_generate_does(wrapper: ModelWrapper, filled: FilledPrompt):
    wrapper.load()
    generation, _ = answer(wrapper, filled, Full(), max_new_tokens=12)
    model, tokenizer = wrapper.loaded.model, wrapper.loaded.tokenizer
    ids = tokenizer(filled.text)["input_ids"]
    room = 400 - 12
    ids = torch.tensor([ids[: room // 2] + ids[-(room // 2) :]])
    model.set_attn_implementation("sdpa")
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    plain = plain[0, ids.shape[1] :]
    assert generation.text == tokenizer.decode(plain[plain != tokenizer.eos_token_id])
    assert generation.truncated
    assert generation.prompt_tokens == room


def test_after_context_keeps_the_question(wrapper: ModelWrapper, filled: FilledPrompt):
    generation, kept = answer(wrapper.load(), filled, SnapKV(16), compress="after_context")
    question = generation.prompt_tokens - generation.compressed_tokens
    assert question == len(filled.text[filled.context_end :].encode())
    for positions in kept:
        assert positions.shape[-1] == 16 + question
        assert (positions[..., -question:] >= generation.compressed_tokens).all()
        assert (positions[..., :-question] < generation.compressed_tokens).all()


def test_after_context_needs_to_know_the_context(wrapper: ModelWrapper):
    with pytest.raises(ValueError, match="filled prompt"):
        wrapper.generate("text", H2O(8), max_new_tokens=2, compress="after_context")


def test_a_fraction_is_of_the_prompt(wrapper: ModelWrapper, filled: FilledPrompt):
    generation, _ = answer(wrapper.load(), filled, H2O(0.25))
    assert generation.budget_tokens == generation.kept_tokens == round(0.25 * generation.prompt_tokens)


def test_cost_is_recorded(wrapper: ModelWrapper, filled: FilledPrompt):
    generation, _ = answer(wrapper.load(), filled, H2O(32))
    model = wrapper.loaded.model.config
    head_dim = model.hidden_size // model.num_attention_heads
    heads = model.num_hidden_layers * model.num_key_value_heads
    assert generation.cache_bytes == 2 * heads * 32 * head_dim * 4
    assert generation.bookkeeping_bytes == heads * 32 * (8 + 4)
    assert generation.prefill_ms > 0
    assert 1 <= generation.generated_tokens <= 8


def test_answer_kept():
    wrapper, row = ModelWrapper(ModelConfig(name="tiny", kind="tiny")).load(), load_rows("demo_qa_512", None, 1)[0]
    prompt = fill_template(load_template("demo_qa", None), row.context, row.input)
    options = {"answers": row.answers, "max_new_tokens": 1}
    assert answer(wrapper, prompt, Full(), **options)[0].answer_kept == 1
    assert 0 < answer(wrapper, prompt, Random(0.5), **options)[0].answer_kept < 1
    assert answer(wrapper, prompt, StreamingLLM(8), **options)[0].answer_kept == 0
    assert answer(wrapper, prompt, Full(), answers=["not in it"], max_new_tokens=1)[0].answer_kept is None


def test_repetition_penalty_of_the_checkpoint_is_ignored(wrapper: ModelWrapper, filled: FilledPrompt):
    before, _ = answer(wrapper.load(), filled, Full())
    wrapper.loaded.model.generation_config.repetition_penalty = 5.0
    after, _ = answer(wrapper, filled, Full())
    wrapper.loaded.model.generation_config.repetition_penalty = 1.0
    assert before.text == after.text


def test_every_eos_of_the_generation_config_ends_the_answer(wrapper: ModelWrapper, filled: FilledPrompt):
    free, _ = answer(wrapper.load(), filled, Full())
    wrapper.loaded.model.generation_config.eos_token_id = [257, *range(256)]
    stopped, _ = answer(wrapper, filled, Full())
    wrapper.loaded.model.generation_config.eos_token_id = None
    assert (stopped.generated_tokens, stopped.text) == (1, "")
    assert free.generated_tokens > 1


def favour(wrapper: ModelWrapper, monkeypatch: pytest.MonkeyPatch, *choices: int) -> None:
    """Make the model's choices, in order of preference, the same at every step."""
    model = wrapper.load().loaded.model
    forward = model.forward

    def biased(*args, **kwargs):
        output = forward(*args, **kwargs)
        for rank, token in enumerate(choices):
            output.logits[..., token] = 1e6 - rank
        return output

    monkeypatch.setattr(model, "forward", biased)


@pytest.mark.parametrize("options", [{}, {"first_token": "compressed"}, {"prefill_chunk": 60}])
def test_an_answer_that_stops_at_a_newline_has_at_least_one_token(wrapper, filled, monkeypatch, options):
    tokenizer = wrapper.loaded.tokenizer
    newline, letter = tokenizer.encode("\n") + tokenizer.encode("x")
    favour(wrapper, monkeypatch, newline, tokenizer.eos_token_id, letter)
    stopped, _ = answer(wrapper, filled, Full(), stop_at_newline=True, **options)
    assert (stopped.text, stopped.generated_tokens) == ("x", 2)
    free, _ = answer(wrapper, filled, Full())
    assert free.text == "\n" * 8


def test_an_eos_at_once_is_an_empty_answer(wrapper, filled, monkeypatch):
    favour(wrapper, monkeypatch, wrapper.loaded.tokenizer.eos_token_id)
    ended, _ = answer(wrapper, filled, Full())
    assert (ended.text, ended.generated_tokens, ended.decode_ms_per_token) == ("", 1, None)


def test_a_prompt_over_the_context_is_refused():
    with pytest.raises(ValueError, match="max_length=9999"):
        ModelWrapper(ModelConfig(name="tiny", kind="tiny", max_length=9999)).load().generate(
            "text", Full(), max_new_tokens=2
        )


def with_model(model) -> ModelWrapper:
    wrapper = ModelWrapper(ModelConfig(name="test", kind="path"))
    wrapper._loaded = LoadedModel(model, byte_tokenizer(), revision=None)
    return wrapper


def test_a_model_that_drops_the_cache_is_found_out():
    model = tiny_model("llama", vocab_size=259)
    inner = model.forward

    def forgetful(*args, **kwargs):
        kwargs["past_key_values"] = None
        return inner(*args, **kwargs)

    model.forward = forgetful
    with pytest.raises(RuntimeError, match="cache of its own"):
        with_model(model).generate("some prompt", H2O(4), max_new_tokens=4)


def test_an_answer_over_a_rope_switch_is_refused():
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    model = tiny_model("phi3", vocab_size=259, original_max_position_embeddings=32, rope_parameters=factors)
    wrapper = with_model(model)
    with pytest.raises(ValueError, match="position 32"):
        wrapper.generate("x" * 30, H2O(4), max_new_tokens=4)
    for length in (20, 40):
        assert wrapper.generate("x" * length, H2O(4), max_new_tokens=4).prompt_tokens == length
