"""A generated text with what it took, and the stream of its pieces."""

from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cab_attention.cache import EvictingCache
from cab_attention.methods import Method


@dataclass(frozen=True)
class GeneratedText:
    """A text and what it took.

    Attributes:
        text: without special tokens, and nothing from a stop string on.
        finish_reason: `stop`: an end-of-sequence token or a stop string; `length`: `max_tokens`.
        token_ids: as generated, an end-of-sequence token and a stop string's included.
        kept_positions: for each layer int64 [G, kept], the prompt's tokens that its KV heads hold right after the
            prompt's cut, -1 for an empty slot.
        kept_tokens: their number, mean over layers and KV heads.
        cache_bytes: K and V at the end.
        full_cache_bytes: the same if nothing had been evicted, computed.
        prefill_ms: from the prompt to the first token.
        decode_ms_per_token: mean over the tokens after the first; None if there are none.
        peak_bytes: peak GPU memory beyond what was allocated at the start; None on a CPU. Streams that take turns
            count in each other's.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    token_ids: list[int]
    implementation: str
    method: Method
    kept_positions: list[Tensor]
    kept_tokens: float
    cache_bytes: int
    full_cache_bytes: int
    prefill_ms: float
    decode_ms_per_token: float | None
    peak_bytes: int | None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def kept_shares(self) -> Tensor:
        """Float64 [prompt_tokens]: of all layers and KV heads, the share that holds this token after the cut."""
        n_heads = sum(len(layer) for layer in self.kept_positions)
        held = torch.cat([layer[layer >= 0] for layer in self.kept_positions])
        return held.bincount(minlength=self.prompt_tokens).double() / n_heads


class TextStream(Iterator[str]):
    """Pieces of text as they are generated; closing it early frees its cache.

    Attributes:
        result: the whole, once the pieces have come to their end.
    """

    def __init__(self, pieces: Generator[str, None, GeneratedText]) -> None:
        self._pieces: Generator[str, None, GeneratedText] | None = pieces
        self.result: GeneratedText | None = None

    def __next__(self) -> str:
        while not (piece := self._step()):
            pass
        return piece

    def steps(self) -> Iterator[str]:
        """The same, but back after every token, with "" where it completes no text."""
        with suppress(StopIteration):
            while True:
                yield self._step()

    def _step(self) -> str:
        if self._pieces is None:
            raise StopIteration
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.result = end.value
            self._pieces = None
            raise

    def close(self) -> None:
        """Stop here. `result` stays as it is."""
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None  # one that never began holds what it was given, on Python 3.12

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def held_positions(cache: Cache, n_seen: int) -> list[Tensor]:
    """For each layer int64 [G, held] of one sequence of which the cache has seen `n_seen` tokens, -1: an empty slot."""
    if isinstance(cache, EvictingCache):
        return [layer.positions[0].cpu() for layer in cache.layers]
    shapes = [layer.keys.shape for layer in cache.layers]
    return [torch.arange(n_seen - shape[2], n_seen).expand(shape[1], shape[2]) for shape in shapes]


def cache_bytes(cache: Cache) -> int:
    """K and V over all layers."""
    if isinstance(cache, EvictingCache):
        return cache.cache_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
