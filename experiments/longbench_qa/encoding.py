"""From a filled prompt to token ids: truncation from the middle, chat template, and where the context ends."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from experiments.longbench_qa.prompts import FilledPrompt


@dataclass(frozen=True)
class EncodedPrompt:
    """A whole prompt, template included, as text and as tokens.

    Attributes:
        ids: token ids.
        offsets: characters of `text` that each token stands for.
        text: what was tokenised.
        context: characters of `text` that are the context's.
        context_end: tokens up to and including the context's last.
        truncated: the middle was cut out.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    text: str
    context: tuple[int, int]
    context_end: int
    truncated: bool


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: FilledPrompt, max_tokens: int, chat_template: bool
) -> EncodedPrompt:
    """Encode as LongBench's authors do.

    A prompt of more than `max_tokens` (less the chat template's own) keeps its first and last half; then the chat
    template is put around it, where the model has one and the data set asks for it, without a second BOS. Raises
    ValueError if what follows the context does not fit into the last half.
    """
    use_template = chat_template and tokenizer.chat_template is not None
    room = max_tokens - (len(_tokenise(tokenizer, _chat(tokenizer, ""), special=False)[0]) if use_template else 0)
    if room < 2:
        raise ValueError(f"no room for a prompt: {max_tokens} tokens are left beside the answer")
    text, tail = prompt.text, prompt.text[prompt.context_end :]
    ids, _ = _tokenise(tokenizer, text, special=True)
    truncated = len(ids) > room
    if truncated:
        half = room // 2
        text = tokenizer.decode(ids[:half], skip_special_tokens=True)
        text += tokenizer.decode(ids[-half:], skip_special_tokens=True)
        if not text.endswith(tail):
            raise ValueError(f"the question and its template do not fit into half of {room} tokens")
    start, end = prompt.context_start, len(text) - len(tail)
    if use_template:
        inside = text.strip()  # some templates strip the message
        chat = _chat(tokenizer, text)
        shift = chat.index(inside) - text.index(inside)
        start, end, text = start + shift, end + shift, chat
    ids, offsets = _tokenise(tokenizer, text, special=not use_template)
    after = (index for index, (first, last) in enumerate(offsets) if first >= end and last > first)
    return EncodedPrompt(ids, offsets, text, (start, end), context_end=next(after, len(ids)), truncated=truncated)


def chat_frame(tokenizer: PreTrainedTokenizerFast) -> list[str] | None:
    """What the chat template puts before and after the message, a default system prompt included; None without one."""
    if tokenizer.chat_template is None:
        return None
    mark = "MESSAGE"
    return _chat(tokenizer, mark).split(mark, 1)


def _chat(tokenizer: PreTrainedTokenizerFast, message: str) -> str:
    turns = [{"role": "user", "content": message}]
    # `enable_thinking` is read by the templates of models that think (Qwen3) and ignored by the others.
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def _tokenise(tokenizer: PreTrainedTokenizerFast, text: str, special: bool) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"]
