"""A prompt on its way to an answer: fed to a cache, decoded greedily, and described with what that took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cab_attention import EvictingCache, Full, Method, SharedPrefill
from experiments.longbench_qa.answer_kept import shares_kept
from experiments.longbench_qa.encoding import EncodedPrompt
from experiments.longbench_qa.greedy import GreedyDecoder, stop_ids
from experiments.longbench_qa.memory import MemoryMeter
from experiments.longbench_qa.plain_cache import PlainCache


@dataclass(frozen=True)
class Generation:
    """An answer and its cost. Peaks are over the weights; None where there is no GPU to measure them on.

    Bytes are summed over the GPUs of a process. Where the ranks of a tensor-parallel run each hold a part of the model,
    the weights' and the peaks are those of the rank with most, and the cache's are summed over the ranks.

    What is kept is measured right after the cut, before whatever of the prompt follows it is fed; the cache's bytes
    when the whole prompt is through and decode begins.

    Where several methods shared a prefill, its time and peak are nobody's own: `prefill_ms`, `prefill_peak_bytes` and
    `total_peak_bytes` are None, and the decode peak leaves the other methods' caches out.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool
    compressed_tokens: int  # prompt tokens seen when the cache was cut
    budget_tokens: int  # what the budget came to
    kept_tokens: float  # mean over layers and KV heads
    kept_by_layer: list[float]  # mean over KV heads
    answer_kept: float | None  # share of the answer's tokens in the context that survived; None if it has none
    answer_kept_heads: list[list[float]] | None  # the same by layer and KV head
    effective: dict[str, int]  # the method's window and sinks at this budget
    cache_bytes: int  # K and V
    bookkeeping_bytes: int  # positions and scores
    prefill_shared: bool  # with other methods
    prefill_ms: float | None  # of all of the prompt, in however many forwards
    decode_ms_per_token: float | None  # None if the first token ended the answer
    weights_bytes: int | None
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None
    total_peak_bytes: int | None


@dataclass(frozen=True)
class Kept:
    """What survived a cut: tokens by layer (mean over KV heads), and shares of the answer's by layer and KV head."""

    by_layer: list[float]
    answer_heads: list[list[float]] | None  # None if the context does not hold the answer


def positions_of(cache: EvictingCache | PlainCache) -> list[Tensor]:
    """By layer, on its device: int64 [1, KV heads, kept], the positions in the cache, -1 for an empty slot."""
    return cache.kept_positions() if isinstance(cache, PlainCache) else [layer.positions for layer in cache.layers]


def of_all_ranks(parts: Sequence[Generation]) -> Generation:
    """One answer of the ranks', each of which holds equally many KV heads of every layer; times are the first rank's.

    Raises RuntimeError if they did not answer alike.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({(part.text, part.generated_tokens) for part in parts}) > 1:
        raise RuntimeError(f"the ranks gave different answers: {[part.text for part in parts]}")

    def most(name: str) -> int | None:
        values = [getattr(part, name) for part in parts]
        return None if None in values else max(values)

    by_layer = [sum(kept) / len(parts) for kept in zip(*(part.kept_by_layer for part in parts), strict=True)]
    heads = [part.answer_kept_heads for part in parts if part.answer_kept_heads is not None]
    by_head = [[share for own in layer for share in own] for layer in zip(*heads, strict=True)] or None
    peaks = ("weights_bytes", "prefill_peak_bytes", "decode_peak_bytes", "total_peak_bytes")
    return replace(
        first,
        kept_tokens=sum(by_layer) / len(by_layer),
        kept_by_layer=by_layer,
        answer_kept=None if by_head is None else sum(map(sum, by_head)) / sum(map(len, by_head)),
        answer_kept_heads=by_head,
        cache_bytes=sum(part.cache_bytes for part in parts),
        bookkeeping_bytes=sum(part.bookkeeping_bytes for part in parts),
        **{name: most(name) for name in peaks},  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Task:
    """An encoded prompt and how to answer it: the same for every method that does.

    Attributes:
        compress_at: tokens of the prompt that are compressed.
        decode_from: tokens that count as the prompt, the rest as decode steps: all of them, or all but the last, which
            is then fed after the cut.
        prefill_chunk: tokens that one forward takes at most; None: no limit.
        answer_tokens: indices of the prompt's tokens that are the answer's.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    encoded: EncodedPrompt
    compress_at: int
    decode_from: int
    prefill_chunk: int | None
    max_new_tokens: int
    stop_at_newline: bool
    sample_id: str
    answer_tokens: Sequence[int]

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return stop_ids(self.model, self.tokenizer, self.stop_at_newline)

    def new_cache(self, method: Method) -> EvictingCache | PlainCache:
        """An empty cache for the prompt."""
        if self.model.config._attn_implementation == "sdpa":
            if not isinstance(method, Full):
                raise ValueError(f"attention=sdpa gives no cache to cut: {method.name} needs cab or eager")
            return PlainCache(self.model.config, method)
        return EvictingCache(
            self.model.config,
            method,
            prompt_tokens=self.decode_from,
            compress_at=self.compress_at,
            sample_ids=self.sample_id,
        )

    def forwards(self) -> list[tuple[int, int]]:
        """[first, last) of the prompt's tokens in each forward: none runs over the cut."""
        n_prompt = len(self.encoded.ids)
        return [*self._chunks(0, self.compress_at), *self._chunks(self.compress_at, n_prompt)]

    def _chunks(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        size = self.prefill_chunk or len(self.encoded.ids)
        return ((start, min(start + size, last)) for start in range(first, last, size))

    def most_keys(self, method: Method, first: int, last: int) -> int:
        """Keys that the forward of [first, last) attends to, in a layer and KV head; at most, where budgets vary."""
        if not (method.evicts and method.evict_in_prefill == "chunk"):
            return last
        budget = method.parsed_budget.tokens(self.compress_at)
        return min(last, budget + last - min(first, self.compress_at))

    def feed_to_cut(self, cache: EvictingCache | PlainCache | SharedPrefill) -> tuple[int, Tensor]:
        """Feed the prompt as far as it is compressed; returns what `GreedyDecoder.step` does."""
        return self._feed(cache, 0, self.compress_at)

    def feed_rest(self, cache: EvictingCache | PlainCache, next_token: tuple[int, Tensor]) -> tuple[int, Tensor]:
        """Feed what follows the cut; `next_token`, what came after it, is returned if nothing does."""
        n_prompt = len(self.encoded.ids)
        return self._feed(cache, self.compress_at, n_prompt) if self.compress_at < n_prompt else next_token

    def _feed(self, cache: EvictingCache | PlainCache | SharedPrefill, first: int, last: int) -> tuple[int, Tensor]:
        decoder = GreedyDecoder(self.model, cache)
        for start, end in self._chunks(first, last):
            ids = torch.tensor([self.encoded.ids[start:end]], device=self.model.device)
            # LongBench's authors let an answer that stops at a newline have at least one token.
            needs_one = self.stop_at_newline and end == len(self.encoded.ids)
            next_token = decoder.step(ids, forbidden=self.stops if needs_one else frozenset())
        return next_token

    def kept(self, cache: EvictingCache | PlainCache) -> Kept:
        """What the cache holds, right after the cut."""
        positions = positions_of(cache)
        one_device = positions[0].device  # layers may lie on several
        by_layer = torch.stack([(layer >= 0).sum(-1).double().mean().to(one_device) for layer in positions])
        return Kept(by_layer.tolist(), shares_kept(self.answer_tokens, positions))

    def answer(
        self,
        cache: EvictingCache | PlainCache,
        next_token: tuple[int, Tensor],
        kept: Kept,
        meter: MemoryMeter,
        prefill: tuple[float, int | None] | None,
    ) -> Generation:
        """Decode, and describe it all.

        Args:
            cache: when the prompt is through.
            next_token: that followed the prompt, as `feed_rest` returns it.
            kept: of the cache, right after the cut.
            meter: made before there was any cache.
            prefill: ms and peak bytes over the weights; None if it was shared.
        """
        method, stops, decoder = cache.method, self.stops, GreedyDecoder(self.model, cache)
        cache_bytes, bookkeeping_bytes = cache.cache_bytes, cache.bookkeeping_bytes

        token, ids = next_token
        answer = [token]
        others = meter.held_beside(cache_bytes + bookkeeping_bytes) if prefill is None else 0
        started = meter.start()
        while len(answer) < self.max_new_tokens and answer[-1] not in stops:
            token, ids = decoder.step(ids)
            answer.append(token)
        decode_ms, decode_peak = meter.stop(started)
        decode_peak = None if decode_peak is None else decode_peak - others
        cache.check_saw(len(self.encoded.ids) + len(answer) - 1)

        prefill_ms, prefill_peak = prefill or (None, None)
        total_peak = None
        if prefill_peak is not None and decode_peak is not None and meter.weights_bytes is not None:
            total_peak = meter.weights_bytes + max(prefill_peak, decode_peak)
        by_head = kept.answer_heads
        budget_tokens = method.parsed_budget.tokens(self.compress_at)
        text = self.tokenizer.decode(answer[:-1] if answer[-1] in stops else answer, skip_special_tokens=True)
        return Generation(
            text=text,
            prompt_tokens=len(self.encoded.ids),
            generated_tokens=len(answer),
            truncated=self.encoded.truncated,
            compressed_tokens=self.compress_at,
            budget_tokens=budget_tokens,
            kept_tokens=sum(kept.by_layer) / len(kept.by_layer),
            kept_by_layer=kept.by_layer,
            answer_kept=None if by_head is None else sum(map(sum, by_head)) / sum(map(len, by_head)),
            answer_kept_heads=by_head,
            effective=method.effective(budget_tokens),
            cache_bytes=cache_bytes,
            bookkeeping_bytes=bookkeeping_bytes,
            prefill_shared=prefill is None,
            prefill_ms=prefill_ms,
            decode_ms_per_token=decode_ms / (len(answer) - 1) if len(answer) > 1 else None,
            weights_bytes=meter.weights_bytes,
            prefill_peak_bytes=prefill_peak,
            decode_peak_bytes=decode_peak,
            total_peak_bytes=total_peak,
        )
