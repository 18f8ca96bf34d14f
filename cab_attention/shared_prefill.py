"""SharedPrefill: one forward of a prompt that fills and cuts the caches of several methods."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from cab_attention.cache import EvictingCache
from cab_attention.cache_layer import EvictingLayer, Operator


class SharedPrefill(Cache):
    """A transformers cache for the one forward that several `EvictingCache`s have in common.

    Eviction comes after a layer's attention, so the forward that ends in the first cut is the same whatever is kept:
    `model(ids, past_key_values=SharedPrefill(caches))`. After it each cache is as if it had been fed alone, and goes on
    alone: with the rest of the prompt after its `compress_at`, then in decode. If it raises, `reset` the caches.

    In every layer each cache is cut before the next layer begins: the peak is one full layer and what all caches keep.

    Args:
        caches: unused ones, made for one model with the same `prompt_tokens` and `compress_at`.

    Raises:
        ValueError: the caches do not belong together; or, from a forward, it is not the first, or not of all tokens up
        to `compress_at`.
    """

    layers: list["SharedLayer"]  # type: ignore[assignment]

    def __init__(self, caches: Sequence[EvictingCache]) -> None:
        if not caches:
            raise ValueError("SharedPrefill needs at least one EvictingCache")
        if len({id(cache) for cache in caches}) < len(caches):
            raise ValueError("SharedPrefill got the same EvictingCache twice")
        if any(cache.get_seq_length() for cache in caches):
            raise ValueError("SharedPrefill takes unused caches: one has seen tokens")
        kinds = [[(layer.sliding_window, layer.rope_switch) for layer in cache.layers] for cache in caches]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError("SharedPrefill takes caches of one model: their layers differ")
        ends = {(cache.prompt.tokens, cache.prompt.compress_at) for cache in caches}
        if len(ends) > 1:
            raise ValueError(f"SharedPrefill takes caches of one (prompt_tokens, compress_at), got {[*ends]}")
        [(tokens, compress_at)] = ends
        end = tokens if compress_at is None else compress_at
        branches = zip(*(cache.layers for cache in caches), strict=True)
        super().__init__(layers=[SharedLayer(layers, end) for layers in branches])  # type: ignore[misc]


class SharedLayer(CacheLayerMixin):
    """One layer of the model, with that layer of every cache."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, branches: Sequence[EvictingLayer], end: int | None) -> None:
        super().__init__()
        self.branches = branches
        self.end = end  # of the forward, in tokens; None: whatever is fed
        self.is_sliding = branches[0].is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the branches hold what there is."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys to every cache. The returned keys carry this layer to the attention function."""
        if self.get_seq_length():
            raise ValueError("SharedPrefill is for one forward, and that is done: go on with each cache by itself")
        if self.end is not None and key_states.shape[2] != self.end:
            raise ValueError(
                f"SharedPrefill takes the {self.end} tokens up to the cut in one forward, got {key_states.shape[2]}"
            )
        for layer in self.branches:
            layer.update(key_states, value_states)
        keys = key_states.view(key_states.shape)
        keys.evicting_layer = self  # type: ignore[attr-defined]
        return keys, value_states

    def attend(
        self, module: nn.Module, operator: Operator, query: Tensor, padding: Tensor | None, **options: Any
    ) -> Tensor:
        """Attention once, then each cache's eviction; arguments and result as for `EvictingLayer.attend`.

        The operator runs once for every number of scored queries that the methods ask for.
        """
        once = _Once(operator)
        # Those that want no scores come last: the output is there by then.
        for layer in sorted(self.branches, key=_wants_no_scores):
            output = layer.attend(module, once, query, padding, **options)
        return output

    def get_seq_length(self) -> int:
        return self.branches[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.branches[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1


def _wants_no_scores(layer: EvictingLayer) -> bool:
    return layer.method.observes in ("nothing", "queries") or not layer.method.evicts


class _Once:
    """An operator that computes the same call once: the branches' calls differ in nothing but which queries are scored.

    The output is the first one computed, for all: which rows are scored does not change it.
    """

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.output: Tensor | None = None
        self.scores: dict[tuple[int, int], Tensor] = {}  # by the number of scored queries and the step between them

    def __call__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        earlier: Tensor | None,
        *,
        score_queries: int | None,
        score_step: int,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        n_queries = query.shape[2]
        rows = n_queries if score_queries is None else min(score_queries, n_queries)
        scored = (rows, score_step if rows > 1 else 1)
        if self.output is not None and rows == 0 and scored not in self.scores:
            self.scores[scored] = torch.zeros_like(next(iter(self.scores.values())))
        if scored not in self.scores:
            output, self.scores[scored] = self.operator(
                query, keys, values, earlier, score_queries=score_queries, score_step=score_step, **options
            )
            self.output = output if self.output is None else self.output
        assert self.output is not None
        return self.output, self.scores[scored]
