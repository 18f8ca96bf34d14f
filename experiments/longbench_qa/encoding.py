"""From a filled prompt to token ids: truncation, chat template, and where the context ends."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from experiments.longbench_qa.prompts import FilledPrompt

TRUNCATE = ("middle", "left", "right")  # what of a too long prompt is cut away


@dataclass(frozen=True)
class EncodedPrompt:
    """A whole prompt, template included, as text and as tokens.

    Attributes:
        ids: token ids.
        offsets: characters of `text` that each token stands for.
        text: what was tokenised.
        context: characters of `text` that are the context's.
        context_end: tokens up to and including the context's last, or where it would be if the cut took it; at least 1.
        truncated: a part was cut away.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    text: str
    context: tuple[int, int]
    context_end: int
    truncated: bool


def encode_prompt(
    tokenizer: PreTrainedTokenizerFast,
    prompt: FilledPrompt,
    max_tokens: int,
    chat_template: bool,
    truncate: str = "middle",
) -> EncodedPrompt:
    """Encode as LongBench's authors do, who truncate the middle.

    A prompt of more than `max_tokens` (less the chat template's own) loses its middle, its left end or its right end,
    as tokens, and becomes text again; then the chat template is put around it, where the model has one and
    `chat_template` asks for it, without a second BOS. Text cut inside a character can come out longer: it is cut
    again, so that the result is never over `max_tokens`.
    Raises ValueError if there is no room for a prompt.
    """
    if truncate not in TRUNCATE:
        raise ValueError(f"truncate={truncate!r}, allowed is one of {', '.join(TRUNCATE)}")
    use_template = chat_template and tokenizer.chat_template is not None
    room = max_tokens - (len(_tokenise(tokenizer, _chat(tokenizer, ""), special=False)[0]) if use_template else 0)
    ids, offsets = _tokenise(tokenizer, prompt.text, special=True)
    step = 2 if truncate == "middle" else 1  # two halves of the same length
    truncated, n_kept = len(ids) > room, room - room % step
    while True:
        if n_kept < 1:
            raise ValueError(f"no room for a prompt: {max_tokens} tokens are left beside the answer")
        text, context = prompt.text, (prompt.context_start, prompt.context_end)
        if truncated:
            text, context = _cut(tokenizer, ids, offsets, _kept(truncate, len(ids), n_kept), context)
        encoded = _encode_whole(tokenizer, text, context, truncated, use_template)
        if len(encoded.ids) <= max_tokens:
            return encoded
        truncated, n_kept = True, n_kept - step


def _kept(truncate: str, n_tokens: int, n_kept: int) -> list[tuple[int, int]]:
    """The stretches of tokens that stay."""
    if truncate == "left":
        return [(max(0, n_tokens - n_kept), n_tokens)]
    if truncate == "right":
        return [(0, n_kept)]
    half = n_kept // 2
    return [(0, half), (max(half, n_tokens - half), n_tokens)]


def _cut(
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    offsets: list[tuple[int, int]],
    kept: list[tuple[int, int]],
    context: tuple[int, int],
) -> tuple[str, tuple[int, int]]:
    """The text of the tokens kept, and where the context lies in it: an edge that was cut away lies at the cut."""

    def before(token: int) -> str:
        """What is left of the text before a token."""
        pieces = [ids[first : min(last, token)] for first, last in kept if first < token]
        return "".join(tokenizer.decode(piece, skip_special_tokens=True) for piece in pieces)

    def place(edge: int) -> int:
        token = next((index for index, (_, last) in enumerate(offsets) if last > edge), len(ids))
        at = len(before(token))
        inside = max(0, edge - offsets[token][0]) if token < len(ids) else 0
        return min(at + inside, len(before(token + 1))) if inside else at

    start, end = context
    return before(len(ids)), (place(start), place(end))


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
