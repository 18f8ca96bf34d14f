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
    template is put around it, where the model has one and the data set asks for it, without a second BOS. Text cut
    inside a character can come out longer: it is cut again, so that the result is never over `max_tokens`.
    Raises ValueError if there is no room for a prompt.
    """
    use_template = chat_template and tokenizer.chat_template is not None
    room = max_tokens - (len(_tokenise(tokenizer, _chat(tokenizer, ""), special=False)[0]) if use_template else 0)
    ids, offsets = _tokenise(tokenizer, prompt.text, special=True)
    truncated, half = len(ids) > room, room // 2
    while True:
        if half < 1:
            raise ValueError(f"no room for a prompt: {max_tokens} tokens are left beside the answer")
        text, end = prompt.text, prompt.context_end
        if truncated:
            text, end = _without_middle(tokenizer, ids, half, _first_after(offsets, end))
        encoded = _encode_whole(tokenizer, text, (min(prompt.context_start, end), end), truncated, use_template)
        if len(encoded.ids) <= max_tokens:
            return encoded
        truncated, half = True, half - 1


def _without_middle(tokenizer: PreTrainedTokenizerFast, ids: list[int], half: int, n_context: int) -> tuple[str, int]:
    """The text of the first and last `half` tokens, and the character in it where the first `n_context` tokens end."""

    def decode(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=True)

    first = decode(ids[:half])
    text = first + decode(ids[-half:])
    if n_context <= half:
        return text, len(decode(ids[:n_context]))
    if n_context <= len(ids) - half:  # what follows the context is itself cut
        return text, len(first)
    return text, len(text) - len(decode(ids[n_context:]))


def _encode_whole(
    tokenizer: PreTrainedTokenizerFast, text: str, context: tuple[int, int], truncated: bool, use_template: bool
) -> EncodedPrompt:
    start, end = context
    if use_template:
        inside = text.strip()  # some templates strip the message
        chat = _chat(tokenizer, text)
        at = chat.index(inside)
        shift = at - text.index(inside)
        start, end = (min(max(edge + shift, at), at + len(inside)) for edge in (start, end))
        text = chat
    ids, offsets = _tokenise(tokenizer, text, special=not use_template)
    return EncodedPrompt(ids, offsets, text, (start, end), max(1, _first_after(offsets, end)), truncated)


def _first_after(offsets: list[tuple[int, int]], end: int) -> int:
    """Index of the first token that begins at character `end` or later; special tokens stand for no characters."""
    after = (index for index, (first, last) in enumerate(offsets) if first >= end and last > first)
    return next(after, len(offsets))


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
