"""From token ids, one after the other, to pieces of text: whole characters only, and nothing from a stop string on."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what decoders give for the first bytes of a character


class TextPieces:
    """The text of a growing list of tokens.

    A piece is handed out when no later token can change it: not while a character lacks bytes, nor while its end could
    be the beginning of a stop string. The pieces joined are `text`: what the tokenizer decodes from all tokens at once
    (without special tokens and without its clean-up of spaces), up to the stop string that is complete first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        if not all(isinstance(word, str) and word for word in stop):
            raise ValueError(f"stop={list(stop)!r}, allowed are strings that are not empty")
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._waiting = ""  # whole characters that may yet turn out to begin a stop string
        # Tokens are decoded with those of the piece before, on which spaces and joined bytes depend.
        self._ids: list[int] = []
        self._before = 0  # of the ids, how many belong to that piece

    def add(self, token: int) -> str:
        """The text that one more token completes; "" if none."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(INCOMPLETE):
            return ""
        self._ids, self._before = self._ids[self._before :], len(self._ids) - self._before
        return self._hand_out(new, is_last=False)

    def finish(self) -> str:
        """What is left when no token follows: a character that lacks bytes is U+FFFD."""
        new = self._new()
        self._ids, self._before = [], 0
        return self._hand_out(new, is_last=True)

    def _new(self) -> str:
        """The text of the tokens after the piece before."""
        known, text = self._decode(self._ids[: self._before]), self._decode(self._ids)
        if text.startswith(known):
            return text[len(known) :]
        # Decoders with a fall-back to bytes give U+FFFD for whole characters too where the next one lacks bytes.
        return self._decode(self._ids[self._before :])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _hand_out(self, new: str, is_last: bool) -> str:
        text = "" if self.stopped else self._waiting + new
        ends = [(text.find(word) + len(word), text.find(word)) for word in self._stop if word in text]
        if ends:
            self.stopped = True
            text, self._waiting = text[: min(ends)[1]], ""
        else:
            held = 0 if is_last else self._could_begin_a_stop(text)
            text, self._waiting = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text

    def _could_begin_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max(map(len, self._stop), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(word.startswith(text[-n:]) for word in self._stop)), 0)
