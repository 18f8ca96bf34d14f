import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from experiments.longbench_qa.encoding import TRUNCATE, chat_frame, encode_prompt
from experiments.longbench_qa.models import byte_tokenizer
from experiments.longbench_qa.prompts import FilledPrompt, fill_template

LONG = "".join(f"{i:05d}" for i in range(1000))
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
    filled = prompt(LONG)
    encoded = encode_prompt(tokenizer, filled, 201, chat_template=True)
    assert encoded.truncated
    assert tokenizer.decode(encoded.ids) == filled.text[:100] + filled.text[-100:]
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == "\n\nQuestion: why?\nAnswer:"


def test_the_left_end_or_the_right_end_can_be_cut_away_instead(tokenizer):
    filled = prompt(LONG)
    left = encode_prompt(tokenizer, filled, 201, chat_template=True, truncate="left")
    assert tokenizer.decode(left.ids) == left.text == filled.text[-201:]
    assert left.text[slice(*left.context)] == LONG[-201 + len("\n\nQuestion: why?\nAnswer:") :]
    assert tokenizer.decode(left.ids[left.context_end :]) == "\n\nQuestion: why?\nAnswer:"
    right = encode_prompt(tokenizer, filled, 201, chat_template=True, truncate="right")
    assert tokenizer.decode(right.ids) == right.text == filled.text[:201]
    assert right.text[slice(*right.context)] == LONG[: 201 - len("Read:\n")]
    assert right.context_end == len(right.ids) == 201  # the question is gone, and what is left ends in the context
    assert left.truncated and right.truncated


@pytest.mark.parametrize("truncate", TRUNCATE)
def test_what_fits_is_not_cut_at_either_end(tokenizer, truncate: str):
    filled = prompt("abc")
    whole = encode_prompt(tokenizer, filled, len(filled.text), chat_template=True, truncate=truncate)
    assert whole == encode_prompt(tokenizer, filled, 1000, chat_template=True)
    assert not whole.truncated


def test_what_may_be_cut_away_is_named(tokenizer):
    with pytest.raises(ValueError, match="truncate='both', allowed is one of middle, left, right"):
        encode_prompt(tokenizer, prompt("abc"), 100, chat_template=True, truncate="both")


@pytest.mark.parametrize(
    ("truncate", "pieces"),
    [("middle", [slice(50), slice(-50, None)]), ("left", [slice(-100, None)]), ("right", [slice(100)])],
)
def test_a_chat_template_goes_around_whatever_was_cut(chat_tokenizer, truncate: str, pieces: list[slice]):
    filled = prompt("x" * 500)
    max_tokens = 100 + len(["<s>", "[", "]", ">"])
    encoded = encode_prompt(chat_tokenizer, filled, max_tokens, chat_template=True, truncate=truncate)
    assert chat_tokenizer.decode(encoded.ids) == "<s>[" + "".join(filled.text[piece] for piece in pieces) + "]>"
    rest = chat_tokenizer.decode(encoded.ids[encoded.context_end :])
    assert rest == ("" if truncate == "right" else "\n\nQuestion: why?\nAnswer:") + "]>"
    assert set(encoded.text[slice(*encoded.context)]) == {"x"}


def test_a_context_that_is_cut_away_lies_at_the_cut(tokenizer, chat_tokenizer):
    behind = fill_template("{context}|{input}", "abc", "w" * 200)
    for tokens, end in ((tokenizer, 1), (chat_tokenizer, len(["<s>", "["]))):
        encoded = encode_prompt(tokens, behind, 100, chat_template=True, truncate="left")
        assert set(encoded.text.strip("<s>[]")) == {"w"}
        assert (encoded.text[slice(*encoded.context)], encoded.context_end) == ("", end)
    before = fill_template("{input}|{context}", "abc", "w" * 200)
    encoded = encode_prompt(tokenizer, before, 100, chat_template=True, truncate="right")
    assert (encoded.context, encoded.context_end) == ((100, 100), 100)
    middle = encode_prompt(tokenizer, fill_template("{input}|{context}", "abc" * 50, "w" * 99), 100, chat_template=True)
    assert middle.text[slice(*middle.context)] == ("abc" * 50)[-50:]  # it begins at the cut


def test_a_context_cut_in_two_is_the_two_ends_that_are_left(tokenizer):
    encoded = encode_prompt(tokenizer, fill_template("{context}", LONG, ""), 100, chat_template=True)
    assert encoded.text[slice(*encoded.context)] == LONG[:50] + LONG[-50:]


@pytest.mark.parametrize("truncate", TRUNCATE)
def test_a_token_may_stand_across_the_contexts_edge(truncate: str):
    alphabet = {symbol: index for index, symbol in enumerate(["<a", "c|", *"<abcwxy|?"])}
    bpe = Tokenizer(models.BPE(vocab=alphabet, merges=[("<", "a"), ("c", "|")]))
    bpe.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    filled = fill_template("<{context}|{input}", "a" + "x" * 200 + "c", "xxxx")
    encoded = encode_prompt(tokenizer, filled, 40, chat_template=False, truncate=truncate)
    contexts = {"middle": "a" + "x" * 34 + "c", "left": "x" * 35 + "c", "right": "a" + "x" * 39}
    assert encoded.text[slice(*encoded.context)] == contexts[truncate]
    assert tokenizer.decode(encoded.ids[encoded.context_end :]) == ("" if truncate == "right" else "xxxx")


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


@pytest.mark.parametrize("truncate", TRUNCATE)
@pytest.mark.parametrize("limit", range(300, 312))
def test_a_character_cut_in_two_does_not_make_the_prompt_too_long(tokenizer, limit: int, truncate: str):
    encoded = encode_prompt(tokenizer, prompt("世界" * 300), limit, chat_template=True, truncate=truncate)
    assert limit - 8 <= len(encoded.ids) <= limit
    rest = tokenizer.decode(encoded.ids[encoded.context_end :])
    assert rest == ("" if truncate == "right" else "\n\nQuestion: why?\nAnswer:")


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


@pytest.mark.parametrize("truncate", TRUNCATE)
def test_the_bos_counts_in_the_truncation_and_is_not_doubled(truncate: str):
    filled = prompt(LONG)
    encoded = encode_prompt(bos_tokenizer(), filled, 200, chat_template=True, truncate=truncate)
    # Half of 200 tokens, the first of them the BOS. It is cut away with the left end, and comes back.
    texts = {"middle": filled.text[:99] + filled.text[-100:], "left": filled.text[-199:], "right": filled.text[:199]}
    assert bos_tokenizer().decode(encoded.ids) == "<s>" + texts[truncate]
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
