import pytest

from experiments.longbench_qa.encoding import encode_prompt
from experiments.longbench_qa.models import byte_tokenizer
from experiments.longbench_qa.prompts import FilledPrompt, fill_template

TEMPLATE = "Read:\n{context}\n\nQuestion: {input}\nAnswer:"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def prompt(context: str, question: str = "why?") -> FilledPrompt:
    return fill_template(TEMPLATE, context, question)


@pytest.mark.parametrize("text", ["plain", "", "Grüße, 世界 {x} <pad", "\n\n tabs\t and  spaces "])
def test_the_byte_tokenizer_is_lossless(tokenizer, text: str):
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_a_short_prompt_is_left_alone(tokenizer):
    encoded = encode_prompt(tokenizer, prompt("abc"), 1000, chat_template=True)
    assert tokenizer.decode(encoded.ids) == "Read:\nabc\n\nQuestion: why?\nAnswer:"
    assert not encoded.truncated
    assert tokenizer.decode(encoded.ids[: encoded.context_end]) == "Read:\nabc"


def test_a_long_prompt_loses_its_middle(tokenizer):
    filled = prompt("".join(f"{i:05d}" for i in range(1000)))
    encoded = encode_prompt(tokenizer, filled, 201, chat_template=True)
    assert encoded.truncated
    assert tokenizer.decode(encoded.ids) == filled.text[:100] + filled.text[-100:]
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == "\n\nQuestion: why?\nAnswer:"


def test_the_context_end_is_found_behind_multi_byte_text(tokenizer):
    encoded = encode_prompt(tokenizer, prompt("Straße 世界", "warum—?"), 1000, chat_template=False)
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == "\n\nQuestion: warum—?\nAnswer:"


def test_a_chat_template_goes_around_the_truncated_prompt(chat_tokenizer):
    filled = prompt("x" * 500)
    encoded = encode_prompt(chat_tokenizer, filled, 104, chat_template=True)
    room = 104 - len(["<s>", "[", "]", ">"])
    text = chat_tokenizer.decode(encoded.ids)
    assert text == "<s>[" + filled.text[: room // 2] + filled.text[-(room // 2) :] + "]>"
    assert encoded.ids.count(chat_tokenizer.bos_token_id) == 1
    assert chat_tokenizer.decode(encoded.ids[encoded.context_end :]).startswith("\n\nQuestion")


def test_a_template_that_strips_moves_the_context_end(chat_tokenizer):
    filled = fill_template("  \n{context}|{input} ", "context", "question")
    encoded = encode_prompt(chat_tokenizer, filled, 100, chat_template=True)
    assert chat_tokenizer.decode(encoded.ids[encoded.context_end :]) == "|question]>"


def test_no_chat_template_where_the_data_set_says_so(chat_tokenizer):
    encoded = encode_prompt(chat_tokenizer, prompt("abc"), 100, chat_template=False)
    assert chat_tokenizer.decode(encoded.ids) == prompt("abc").text


def test_a_question_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match="question"):
        encode_prompt(tokenizer, prompt("abc", "w" * 200), 100, chat_template=True)
    with pytest.raises(ValueError, match="no room"):
        encode_prompt(tokenizer, prompt("abc"), 1, chat_template=True)


def test_a_prompt_of_context_alone_ends_with_it(tokenizer):
    encoded = encode_prompt(tokenizer, fill_template("{context}", "abc", ""), 100, chat_template=False)
    assert encoded.context_end == len(encoded.ids) == 3
