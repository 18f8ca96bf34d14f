"""One layer of an EvictingCache: its keys, where they stood, and the cut right after its attention."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from cab_attention.methods.base import CachedKeys, Method, select_slots

Operator = Callable[..., tuple[Tensor, Tensor]]
"""Attention with the signature of `flash_attention_with_cumulative_scores`."""

# Attention implementations that hand each layer's keys back to this cache.
IMPLEMENTATIONS = ("cab", "eager_with_scores")

CANNOT_GO_BACK = (
    "EvictingCache cannot be cropped: evicted tokens do not come back. Assisted and speculative decoding need that; "
    "use greedy, sampling or beam search"
)


@dataclass
class Prompt:
    """Where the prompt ends, in tokens (columns of `input_ids`, padding included). Shared by a cache's layers."""

    tokens: int | None
    compress_at: int | None
    sample_ids: tuple[str, ...] | None
    first_forward: int | None = None

    def fix(self, seen: int) -> tuple[int, int]:
        """(tokens, compress_at), the first forward being the whole prompt unless it was said otherwise."""
        if self.first_forward is None:
            self.first_forward = seen
        tokens = self.first_forward if self.tokens is None else self.tokens
        return tokens, tokens if self.compress_at is None else self.compress_at

    def ids(self, n_batch: int) -> tuple[str, ...]:
        """A sample id a row: those given, each for as many rows as it has beams, or "" for all."""
        given = self.sample_ids or ("",)
        if n_batch % len(given):
            raise ValueError(f"EvictingCache got {len(given)} sample ids for a batch of {n_batch}")
        return tuple(name for name in given for _ in range(n_batch // len(given)))  # beams of a row lie together


class EvictingLayer(CacheLayerMixin):
    """The kept keys of one layer.

    Attributes:
        keys, values: [B, G, kept, D].
        positions: int64 [B, G, kept], original positions in order (columns of `input_ids`), -1 for an empty slot, at
            the front.
        scores: float32 [B, G, kept], what the method observed so far; None if it observes nothing.
        seen: tokens that went through, kept or not.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    keys: Tensor
    values: Tensor
    positions: Tensor
    _budget: Tensor  # [B, 1, 1] in tokens, set at the first cut
    _n_real: Tensor  # [B], real tokens seen

    def __init__(
        self,
        method: Method,
        prompt: Prompt,
        layer_index: int,
        sliding_window: int | None,
        rope_switch: int | None = None,
    ) -> None:
        super().__init__()
        self.rope_switch = rope_switch
        self.method = method
        self.prompt = prompt
        self.layer_index = layer_index
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new sequence."""
        self.keys = self.values = self.positions = None  # type: ignore[assignment]
        self.scores: Tensor | None = None
        self.seen = 0
        self.is_initialized = False
        self._has_empty_slots = False
        self._awaits_attention = False
        self._recent_queries: Tensor | None = None  # of a prompt fed in chunks, for methods that observe a window
        self._budget = self._n_real = None  # type: ignore[assignment]
        self._width = 0  # tokens, of the row with the largest budget

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(*key_states.shape[:2], 0, dtype=torch.int64, device=self.device)
        self._n_real = torch.zeros(len(key_states), dtype=torch.int64, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new keys. The returned keys carry this layer to the attention function, which calls `attend`."""
        if self._awaits_attention:
            raise RuntimeError(
                f"layer {self.layer_index}: attention never came back to EvictingCache, so nothing would be evicted. "
                f"Load the model with attn_implementation in {IMPLEMENTATIONS}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_batch, n_heads, n_new, _ = key_states.shape
        if self.rope_switch is not None and 0 < self.seen <= self.rope_switch < self.seen + n_new:
            raise ValueError(
                f"the sequence runs over position {self.rope_switch}, where this model changes its RoPE factors and "
                "what is cached goes stale: keep prompt and answer on one side, or feed the whole prompt at once"
            )
        new_positions = torch.arange(self.seen, self.seen + n_new, device=self.device)
        new_positions = new_positions.expand(n_batch, n_heads, n_new)
        if self.keys.shape[2] == 0:
            self.keys, self.values, self.positions = key_states, value_states, new_positions
        else:
            self.keys = torch.cat([self.keys, key_states], dim=2)
            self.values = torch.cat([self.values, value_states], dim=2)
            self.positions = torch.cat([self.positions, new_positions], dim=2)
        self.seen += n_new
        self._awaits_attention = True
        # A view: were the stored tensor itself to point here, tensor and layer would hold each other.
        keys = self.keys.view(self.keys.shape)
        keys.evicting_layer = self  # type: ignore[attr-defined]
        return keys, self.values

    def attend(self, operator: Operator, query: Tensor, padding: Tensor | None, **options: Any) -> Tensor:
        """Attention of the new queries over what is cached, then the eviction that the method asks for.

        Args:
            operator: computes output and scores.
            query: [B, H, Q, D].
            padding: bool [B, >= Q], its last Q columns False where a new token is padding; None if there is none.
            options: the operator's `scale`, `softcap`, `sliding_window`, `is_causal`.

        Returns:
            output [B, H, Q, D].
        """
        self._awaits_attention = False
        if options.get("sliding_window") != self.sliding_window:
            raise ValueError(
                f"layer {self.layer_index} has a sliding window of {self.sliding_window} in the model's config, but "
                f"its attention asked for {options.get('sliding_window')}: EvictingCache cannot serve this model"
            )
        n_new = query.shape[2]
        self._mark_padding(padding, n_new)
        before, (prompt_tokens, compress_at) = self.seen - n_new, self.prompt.fix(self.seen)
        self._check_step(before, n_new, prompt_tokens, compress_at)

        def observe(query: Tensor, rows: int | None, earlier: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return operator(
                query,
                self.keys,
                self.values,
                earlier,
                key_mask=self.positions >= 0 if self._has_empty_slots else None,
                key_positions=self.positions if self.sliding_window is not None else None,
                score_queries=rows,
                per_kv_head=True,
                **options,
            )

        method, cut_now = self.method, self.seen == compress_at
        decoding = before >= prompt_tokens
        cuts = method.evicts and (cut_now or (decoding and method.evicts_in_decode))
        if not method.evicts or method.observes == "nothing":
            output, _ = observe(query, 0)
        elif method.observes == "all":
            output, self.scores = observe(query, None, self.scores)
        elif method.observes == "last":
            output, self.scores = observe(query, 1 if cuts else 0)
        else:
            output = self._observe_window(observe, query, before, compress_at)
        if cuts:
            self._evict(after_cut=range(compress_at, compress_at if cut_now else prompt_tokens))
            if not method.evicts_in_decode:
                self.scores = None  # they have done their work
        elif self.sliding_window is not None:
            self._drop_out_of_window(self.sliding_window - 1 + self._kept_for_later_scores(compress_at))
        if before == 0:  # a view into a larger tensor (a fused projection) must not keep that alive
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()
        return output

    def _mark_padding(self, padding: Tensor | None, n_new: int) -> None:
        if padding is None:
            self._n_real = self._n_real + n_new
            return
        is_real = padding[:, -n_new:]
        if n_new > 1 and self.layer_index == 0:  # reading it waits for the GPU: once a prefill
            goes_back = (is_real[:, 1:] < is_real[:, :-1]).any() | ((self._n_real > 0) & ~is_real[:, 0]).any()
            if bool(goes_back):
                raise ValueError("EvictingCache takes left padding only: a row has padding after a token")
        new_positions = torch.where(is_real[:, None], self.positions[:, :, -n_new:], -1)
        self.positions = torch.cat([self.positions[:, :, :-n_new], new_positions], dim=2)
        self._n_real = self._n_real + is_real.sum(-1)
        self._has_empty_slots = True

    def _check_step(self, before: int, n_new: int, prompt_tokens: int, compress_at: int) -> None:
        if not self.method.evicts:
            return
        for name, end in (("compress_at", compress_at), ("prompt_tokens", prompt_tokens)):
            if before < end < self.seen:
                raise ValueError(f"a forward from token {before} to {self.seen} runs over {name}={end}: split it there")
        if n_new > 1 and before >= prompt_tokens:
            raise ValueError(
                f"a forward of {n_new} tokens after the prompt of {prompt_tokens}: for a prompt fed in chunks, or text "
                "that follows a compressed context, give EvictingCache(prompt_tokens=..., compress_at=...)"
            )

    def _observe_window(self, observe: Operator, query: Tensor, before: int, compress_at: int) -> Tensor:
        """Scores of the window's queries, also when the prompt came in chunks shorter than the window."""
        window = self.method.observation_window()
        if self.seen > compress_at:
            return observe(query, 0)[0]
        if self.seen == compress_at and (before == 0 or query.shape[2] >= window):
            output, self.scores = observe(query, window)
            self._recent_queries = None
            return output
        output, _ = observe(query, 0)
        earlier = [] if self._recent_queries is None else [self._recent_queries]
        # Cloned: a view would keep the whole chunk alive.
        self._recent_queries = torch.cat([*earlier, query[:, :, -window:]], dim=2)[:, :, -window:].clone()
        if self.seen == compress_at:
            _, self.scores = observe(self._recent_queries, None)
            self._recent_queries = None
        return output

    def _kept_for_later_scores(self, compress_at: int) -> int:
        """Keys before the sliding window that the observed queries, still to be scored, can see."""
        waiting = self.method.evicts and self.method.observes == "window" and self.seen < compress_at
        return self.method.observation_window() if waiting else 0

    def _drop_out_of_window(self, reach: int) -> None:
        """Empty the slots of keys before the last `reach` positions, and free the slots surely empty."""
        if self.seen <= reach:
            return
        self.positions = torch.where(self.positions >= self.seen - reach, self.positions, -1)
        self._has_empty_slots = True
        # Positions rise strictly, so only the last `reach` slots can hold a key of the window.
        if self.keys.shape[2] > reach:
            last = slice(self.keys.shape[2] - reach, None)
            self.keys = self.keys[:, :, last].contiguous()
            self.values = self.values[:, :, last].contiguous()
            self.positions = self.positions[:, :, last]
            self.scores = None if self.scores is None else self.scores[:, :, last]

    def _evict(self, after_cut: range) -> None:
        """Cut to the budget; the part of the prompt in `after_cut` stays in full, on top of it, out of competition."""
        window = self.sliding_window
        if window is not None:
            self._drop_out_of_window(window - 1)
            after_cut = range(max(after_cut.start, self.seen - (window - 1)), after_cut.stop)
        if self._budget is None:
            self._set_budget()
        n_pinned, n_slots = len(after_cut), self.keys.shape[2]
        budget, width = self._budget, self._width
        if window is not None:
            budget, width = budget.clamp(max=window - 1 - n_pinned), min(width, window - 1 - n_pinned)
        if n_slots <= width + n_pinned and not self._has_empty_slots:
            return  # nothing to drop

        keys, positions, scores = self.keys, self.positions, self.scores
        if n_pinned:
            is_pinned = (positions >= after_cut.start) & (positions < after_cut.stop)
            pinned_first = is_pinned.int().argsort(dim=-1, descending=True, stable=True)
            pinned, competing = pinned_first[..., :n_pinned], pinned_first[..., n_pinned:]
            keys, positions = _gather(keys, competing), positions.gather(2, competing)
            scores = None if scores is None else scores.gather(2, competing)
        cached = CachedKeys(
            keys=keys,
            positions=positions,
            scores=scores,
            budget=budget,
            layer_index=self.layer_index,
            sample_ids=self.prompt.ids(self.keys.shape[0]),
        )
        slots = select_slots(self.method.priorities(cached), cached.valid, budget, width)
        if n_pinned:
            slots = torch.where(slots < 0, -1, competing.gather(2, slots.clamp(min=0)))
            slots = torch.cat([slots, pinned], dim=2).sort(dim=-1).values
        source = slots.clamp(min=0)
        self.keys = _gather(self.keys, source)
        self.values = _gather(self.values, source)
        self.positions = self.positions.gather(2, source).masked_fill(slots < 0, -1)
        if self.scores is not None:
            self.scores = self.scores.gather(2, source).masked_fill(slots < 0, 0.0)

    def _set_budget(self) -> None:
        """Resolve the budget, once, on the real tokens of each row when the cache is first cut."""
        budget = self.method.parsed_budget
        if isinstance(budget.value, int):
            rows = [budget.value] * self.keys.shape[0]
        else:
            rows = [budget.tokens(n) for n in self._n_real.tolist()]
        self._budget = torch.tensor(rows, device=self.device)[:, None, None]
        self._width = max(rows) if rows else 0

    @property
    def budget_tokens(self) -> list[int] | None:
        """The budget in tokens, a row; None before the first cut."""
        return None if self._budget is None else self._budget.flatten().tolist()

    @property
    def cache_bytes(self) -> int:
        """Storage of K and V in bytes."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Storage of positions and scores in bytes."""
        return sum(tensor.nbytes for tensor in (self.positions, self.scores) if tensor is not None)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        for name in ("keys", "values", "positions", "scores", "_recent_queries", "_budget", "_n_real"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, select(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(lambda tensor: tensor[indices])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(CANNOT_GO_BACK)


def _gather(tensor: Tensor, slots: Tensor) -> Tensor:
    return tensor.gather(2, slots[..., None].expand(-1, -1, -1, tensor.shape[-1]))
