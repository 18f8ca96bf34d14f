"""One layer of an EvictingCache: its keys, where they stood, and the cut right after its attention."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from cab_attention.cut import gather_slots, set_apart, slots_to_keep
from cab_attention.key_store import KeyStore
from cab_attention.methods.base import CachedKeys, Method
from cab_attention.observation import Observation
from cab_attention.prompt import Prompt, RowBudgets
from cab_attention.rotary import Rotary
from cab_attention.tensor_parallel import HeadRanks, ranks_of

Operator = Callable[..., tuple[Tensor, Tensor]]
"""Attention with the signature of `flash_attention_with_cumulative_scores`."""

# Attention implementations that hand each layer's keys back to this cache.
IMPLEMENTATIONS = ("cab", "eager_with_scores")

CANNOT_GO_BACK = (
    "EvictingCache cannot be cropped: evicted tokens do not come back. Assisted and speculative decoding need that; "
    "use greedy, sampling or beam search"
)


class EvictingLayer(CacheLayerMixin):
    """The kept keys of one layer.

    Attributes:
        keys, values: [B, G, kept, D]; laid out anew at each look where heads keep different numbers.
        positions: int64 [B, G, kept], original positions in order (columns of `input_ids`), -1 for an empty slot, at
            the front. Of a tensor-parallel model a rank's layer has that rank's heads.
        scores: float32 [B, G, kept], what the method observed so far; None if it observes no weights.
        seen: tokens that went through, kept or not.
        computed_once: see `CachedKeys`; only while a `SharedPrefill` cuts.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    _store: KeyStore
    _padding: Tensor | None  # int64 [B], tokens seen that are padding; None while there are none

    def __init__(
        self,
        method: Method,
        prompt: Prompt,
        layer_index: int,
        sliding_window: int | None,
        rope_switch: int | None = None,
        earlier_layers: Sequence["EvictingLayer"] = (),
        n_layers: int = 1,
        peers: tuple[int, int] = (0, 1),
    ) -> None:
        """`earlier_layers`: what the last layer cuts together with itself; `peers`: see `CachedKeys`."""
        # Not the parent's: it would set keys and values, which are looked up here.
        self.earlier_layers = earlier_layers
        self.n_layers = n_layers
        self.peers = peers
        self.rope_switch = rope_switch
        self.method = method
        self.prompt = prompt
        self.layer_index = layer_index
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next forward begins a new sequence."""
        self._store = None  # type: ignore[assignment]
        self._padding = None
        self.computed_once: dict[str, Any] | None = None
        self.is_initialized = False
        self.seen = 0
        self._awaits_attention = False
        self._observation = Observation(self.method)
        self._rotary: Rotary | None = None  # made at the first forward, where the method needs it
        self._budget: RowBudgets | None = None  # set at the first cut
        self._ranks: HeadRanks | None = None  # known at the first attention

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return None if self._store is None else self._store.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return None if self._store is None else self._store.values

    @property
    def positions(self) -> Tensor:
        return self._store.positions

    @property
    def scores(self) -> Tensor | None:
        return self._observation.scores

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._store = KeyStore(key_states, value_states)
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
        n_new = key_states.shape[2]
        if self.rope_switch is not None and 0 < self.seen <= self.rope_switch < self.seen + n_new:
            raise ValueError(
                f"the sequence runs over position {self.rope_switch}, where this model changes its RoPE factors and "
                "what is cached goes stale: keep prompt and answer on one side, or feed the whole prompt at once"
            )
        self._store.append(key_states, value_states, self.seen)
        self.seen += n_new
        self._awaits_attention = True
        # A view: were the stored tensor itself to point here, tensor and layer would hold each other.
        keys = self._store.keys.view(self._store.keys.shape)
        keys.evicting_layer = self  # type: ignore[attr-defined]
        return keys, self._store.values

    def attend(
        self, module: nn.Module, operator: Operator, query: Tensor, padding: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention of the new queries over what is cached, then the eviction that the method asks for.

        Args:
            module: the model's attention module, which knows how the model rotates keys.
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
        n_new, method = query.shape[2], self.method
        real = None if padding is None else padding[:, -n_new:]
        self._take_padding(real, n_new)
        before, (prompt_tokens, compress_at) = self.seen - n_new, self.prompt.fix(self.seen)
        if before == 0:
            self._ranks = ranks_of(module, self.positions.shape[1])
        if method.evicts:
            self.prompt.check_step(before, self.seen)
            if self._rotary is None and (method.positions == "compacted" or method.observes == "queries"):
                self._rotary = Rotary(module)
        keys, values = self._keys_as_seen(), self._store.values

        def attend_to(
            query: Tensor, score_queries: int | None, earlier: Tensor | None = None, *, step: int = 1, hidden: int = 0
        ) -> tuple[Tensor, Tensor]:
            there = slice(keys.shape[2] - hidden)
            positions = self.positions[:, :, there]
            return operator(
                query,
                keys[:, :, there],
                values[:, :, there],
                earlier,
                key_mask=positions >= 0 if self._store.has_empty_slots else None,
                key_positions=positions if self.sliding_window is not None else None,
                score_queries=score_queries,
                score_step=step,
                per_kv_head=True,
                **options,
            )

        cut_prompt = self.seen == compress_at or (self.seen < compress_at and method.evict_in_prefill == "chunk")
        due = before >= prompt_tokens and (self.seen - prompt_tokens) % method.evict_every == 0
        cuts = method.evicts and (cut_prompt or (due and method.evicts_in_decode))
        output = self._observation.attend(attend_to, query, before=before, compress_at=compress_at, cuts=cuts)
        if self._rotary is not None and method.observes == "queries" and self.seen <= compress_at:
            place = torch.arange(before, self.seen, device=query.device)[None]
            place = place if self._padding is None else place - self._padding[:, None]
            self._observation.take_moments(self._rotary, query, place, real)
        if cuts:
            self._cut(range(compress_at, compress_at if cut_prompt else prompt_tokens), options.get("scale"))
        elif self.sliding_window is not None:
            waiting = self._observation.reach_of_waiting_queries(self.seen, compress_at)
            self._drop_out_of_window(self.sliding_window - 1 + waiting)
        if before == 0:
            self._store.own()
        if method.budgets_vary_by_head and self._store.has_gaps and self.sliding_window is None:
            self._store.pack()
        return output

    def request(self) -> tuple[int | None, int]:
        """The operator's (score_queries, score_step) in a forward of all that is compressed."""
        return self._observation.request()

    def _keys_as_seen(self) -> Tensor:
        """The keys at the positions where attention sees them."""
        keys = self._store.keys
        if self.method.positions == "original" or not self._store.has_gaps:
            return keys
        assert self._rotary is not None
        # Stored keys stay as they came: moved anew from there each time, they are rounded once, not once a step.
        from_end = torch.arange(keys.shape[2] - 1, -1, -1, device=keys.device)
        moved = (self.seen - 1 - from_end - self.positions).masked_fill(self.positions < 0, 0)
        return self._rotary.rotate(keys, moved)

    def _take_padding(self, is_real: Tensor | None, n_new: int) -> None:
        if is_real is None:
            return
        padding, before = 0 if self._padding is None else self._padding, self.seen - n_new
        if n_new > 1 and self.layer_index == 0:  # reading it waits for the GPU: once a prefill
            goes_back = (is_real[:, 1:] < is_real[:, :-1]).any() | (~is_real[:, 0] & (padding < before)).any()
            if bool(goes_back):
                raise ValueError("EvictingCache takes left padding only: a row has padding after a token")
        self._store.empty_padding(is_real)
        self._padding = padding + (~is_real).sum(-1)

    def _drop_out_of_window(self, reach: int) -> None:
        """Let go of keys before the last `reach` positions."""
        if self.seen > reach:
            left = self._store.drop_before(self.seen - reach, reach)
            if left is not None:
                self._observation.select_slots(lambda scores: scores[:, :, left])

    def _cut(self, after_cut: range, scale: float | None) -> None:
        """Cut this layer to the budget; the last layer cuts all of them where they choose together.

        The part of the prompt in `after_cut` stays in full, on top of the budget and out of competition.
        """
        layers: list[EvictingLayer] = [self]
        if self.method.granularity == "model":
            if self.layer_index < self.n_layers - 1:
                return
            layers = [*self.earlier_layers, self]
        contests = [layer._contest(after_cut, scale) for layer in layers]
        present = [contest for contest in contests if contest is not None]
        if present:  # layers that choose together hold alike: all of them, or none
            last, fills = present[-1], all(contest.fills for contest in present)
            slots = slots_to_keep(self.method, [contest.cached for contest in present], last.width, fills)
            for layer, contest in zip(layers, present, strict=True):
                layer._keep(slots.to(layer.device).expand(-1, layer.positions.shape[1], -1), contest, fills)
        if not self.method.evicts_in_decode and self.seen >= self.prompt.fix(self.seen)[1]:
            for layer in layers:
                layer._observation.forget()

    def _contest(self, after_cut: range, scale: float | None) -> "_Contest | None":
        """The keys that compete for the budget; None if there is room for all."""
        window = self.sliding_window
        if window is not None:
            self._drop_out_of_window(window - 1)
            after_cut = range(max(after_cut.start, self.seen - (window - 1)), after_cut.stop)
        if self._budget is None or not self._budget.is_final:  # a fraction may be of more than was seen so far
            end = self.prompt.fix(self.seen)[1]
            self._budget = RowBudgets.resolve(
                self.method.parsed_budget,
                len(self.positions),
                self.device,
                max(end, self.seen),
                self._padding,
                is_final=end <= self.seen,
            )
        n_pinned, budget, width = len(after_cut), self._budget.tokens, self._budget.most
        if window is not None:
            budget, width = budget.clamp(max=window - 1 - n_pinned), min(width, window - 1 - n_pinned)
        if self.positions.shape[2] <= width + n_pinned and not self._store.has_empty_slots:
            return None
        keys, values, positions, scores = self._keys_as_seen(), self._store.values, self.positions, self.scores
        pinned = competing = None
        if n_pinned:
            pinned, competing = set_apart(positions, after_cut)
            keys, values = gather_slots(keys, competing), gather_slots(values, competing)
            positions = positions.gather(2, competing)
            scores = None if scores is None else scores.gather(2, competing)
        cached = CachedKeys(
            keys=keys,
            values=values,
            positions=positions,
            scores=scores,
            budget=budget,
            queries=partial(self._queries_to_come, scale) if self.method.observes == "queries" else None,
            layer_index=self.layer_index,
            peers=self.peers,
            sample_ids=self.prompt.ids(len(positions)),
            ranks=self._ranks,
            computed_once=self.computed_once,
        )
        fills = self._padding is None and not (self._store.has_empty_slots or self.method.budgets_vary_by_head)
        return _Contest(cached, width, fills, pinned, competing)

    def _queries_to_come(self, scale: float | None, n: int) -> tuple[Tensor, Tensor]:
        assert self._rotary is not None
        moments, dim = self._observation.moments(), self._store.keys.shape[3]
        n_real = torch.full((len(self.positions),), self.seen, device=self.device)
        n_real = n_real if self._padding is None else n_real - self._padding
        mean, covariance = self._rotary.rotate_moments(moments.mean, moments.covariance, n_real, n)
        factor = 1.0 if scale is None else scale * dim**0.5
        return mean * factor, covariance * factor**2

    def _keep(self, slots: Tensor, contest: "_Contest", fills: bool) -> None:
        """Keep the slots [B, G, W] of those that competed (-1: none, unless it `fills`), and the pinned."""
        if contest.pinned is not None and contest.competing is not None:
            slots = torch.where(slots < 0, -1, contest.competing.gather(2, slots.clamp(min=0)))
            slots = torch.cat([slots, contest.pinned], dim=2).sort(dim=-1).values
        empty = None if fills else slots < 0
        slots = slots if empty is None else slots.clamp(min=0)
        self._store.keep(slots, empty)
        self._observation.select_slots(lambda scores: scores.gather(2, slots))
        if empty is not None:
            self._observation.select_slots(lambda scores: scores.masked_fill(empty, 0.0))

    @property
    def budget_tokens(self) -> list[int] | None:
        """The budget in tokens, a row; None before the first cut."""
        return None if self._budget is None else self._budget.tokens.flatten().tolist()

    @property
    def cache_bytes(self) -> int:
        """Storage of K and V in bytes."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Storage of positions, scores and what says which key is whose, in bytes."""
        scores = 0 if self.scores is None else self.scores.nbytes
        return scores if self._store is None else scores + self._store.bookkeeping_bytes

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def _select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        if self._store is not None:
            self._store.select_rows(select)
        if self._padding is not None:
            self._padding = select(self._padding)
        if self._budget is not None:
            self._budget = replace(self._budget, tokens=select(self._budget.tokens))
        self._observation.select_rows(select)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(CANNOT_GO_BACK)


@dataclass(frozen=True)
class _Contest:
    """The keys of a layer that compete for its budget.

    Attributes:
        cached: they.
        width: slots to keep, where the method gives every layer and head the same.
        fills: every row and head has more keys than that, and keeps as many.
        pinned, competing: slots [B, G, .] of the layer, where some of its keys do not compete.
    """

    cached: CachedKeys
    width: int
    fills: bool
    pinned: Tensor | None
    competing: Tensor | None
