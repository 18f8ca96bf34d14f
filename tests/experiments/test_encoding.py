import pytest
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing

from experiments.longbench_qa.encoding import chat_frame, encode_prompt
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


def test_a_question_longer_than_half_is_cut_like_the_rest(tokenizer):
    filled = prompt("abc" * 40, "w" * 200)
    encoded = encode_prompt(tokenizer, filled, 100, chat_template=True)
    assert tokenizer.decode(encoded.ids) == filled.text[:50] + filled.text[-50:]
    assert encoded.context_end == 50  # the context's part of the first half
    early = encode_prompt(tokenizer, prompt("abc", "w" * 200), 100, chat_template=True)
    assert tokenizer.decode(early.ids[: early.context_end]) == "Read:\nabc"


def test_no_room_is_said(tokenizer):
    with pytest.raises(ValueError, match="no room"):
        encode_prompt(tokenizer, prompt("abc"), 1, chat_template=True)


@pytest.mark.parametrize("limit", range(300, 312))
def test_a_character_cut_in_two_does_not_make_the_prompt_too_long(tokenizer, limit: int):
    encoded = encode_prompt(tokenizer, prompt("世界" * 300), limit, chat_template=True)
    assert limit - 8 <= len(encoded.ids) <= limit
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == "\n\nQuestion: why?\nAnswer:"


def test_a_tokenizer_that_normalises_text():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    filled = prompt("x" * 500, "cafe\u0301?")
    encoded = encode_prompt(tokenizer, filled, 200, chat_template=True)
    assert encoded.truncated
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == "\n\nQuestion: caf\u00e9?\nAnswer:"


def test_an_empty_context_and_a_stripped_one(chat_tokenizer):
    assert encode_prompt(chat_tokenizer, prompt(""), 100, chat_template=False).context_end == len("Read:\n")
    nothing_before = fill_template("{context}?", "", "")
    assert encode_prompt(byte_tokenizer(), nothing_before, 100, chat_template=False).context_end == 1
    stripped = encode_prompt(chat_tokenizer, fill_template("{context}", "\n\nabc \n", ""), 100, chat_template=True)
    assert stripped.text[slice(*stripped.context)] == "abc"


def test_a_prompt_of_context_alone_ends_with_it(tokenizer):
    encoded = encode_prompt(tokenizer, fill_template("{context}", "abc", ""), 100, chat_template=False)
    assert encoded.context_end == len(encoded.ids) == 3


def bos_tokenizer():
    """One that puts a BOS before every text, as Llama's does."""
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def test_one_bos_without_a_template_and_none_of_its_own_with_one():
    tokenizer = bos_tokenizer()
    plain = encode_prompt(tokenizer, prompt("abc"), 100, chat_template=True)
    assert plain.ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = CHAT
    chat = encode_prompt(tokenizer, prompt("abc"), 100, chat_template=True)
    for encoded in (plain, chat):
        assert encoded.ids.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(encoded.ids[: encoded.context_end]).endswith("Read:\nabc")


def test_the_bos_counts_in_the_truncation_and_is_not_doubled():
    filled = prompt("".join(f"{i:05d}" for i in range(1000)))
    encoded = encode_prompt(bos_tokenizer(), filled, 200, chat_template=True)
    text = filled.text[:99] + filled.text[-100:]  # half of 200 tokens, the first of them the BOS
    assert bos_tokenizer().decode(encoded.ids) == "<s>" + text
    assert len(encoded.ids) == 200


def test_thinking_is_off_where_a_template_has_it(chat_tokenizer):
    chat_tokenizer.chat_template = CHAT + "{% if enable_thinking is not false %}<think>{% endif %}"
    encoded = encode_prompt(chat_tokenizer, prompt("abc"), 100, chat_template=True)
    assert "<think>" not in chat_tokenizer.decode(encoded.ids)


def test_a_rows_text_is_data_to_a_chat_template(chat_tokenizer):
    hostile = "{{ 7 * 7 }} {% raw %} {messages.__class__} {0} %s </s>"
    encoded = encode_prompt(chat_tokenizer, prompt(hostile, hostile), 1000, chat_template=True)
    assert encoded.text == "<s>[" + prompt(hostile, hostile).text + "]>"


def test_a_default_system_prompt_is_on_record(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ '<system>You are helpful.' }}" + CHAT
    assert chat_frame(chat_tokenizer) == ["<system>You are helpful.<s>[", "]>"]
    assert chat_frame(byte_tokenizer()) is None
