"""SharedPrefill: one forward of a prompt that fills and cuts the caches of several methods."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from cab_attention.cache import EvictingCache
from cab_attention.cache_layer import EvictingLayer, Operator
from cab_attention.kernels.flash_attention_accumulate import (
    flash_attention_with_cumulative_scores,
    flash_attention_with_several_scores,
)
from cab_attention.methods.base import Method


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
        self.computed = _shared_between_budgets([layer.method for layer in branches])
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
        """Attention once, then each cache's eviction; arguments and result as for `EvictingLayer.attend`."""
        once = _Once(operator, [layer.request() for layer in self.branches])
        for layer, computed in zip(self.branches, self.computed, strict=True):
            layer.computed_once = computed
            output = layer.attend(module, once, query, padding, **options)
            layer.computed_once = None
        for computed in self.computed:
            computed.clear()
        return output

    def get_seq_length(self) -> int:
        return self.branches[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.branches[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1


def _shared_between_budgets(methods: Sequence[Method]) -> list[dict[str, Any]]:
    """A dictionary for each method, the same one for those that differ in nothing but the budget."""
    shared: list[tuple[tuple[type, dict[str, Any]], dict[str, Any]]] = []
    for method in methods:
        options = {field.name: getattr(method, field.name) for field in fields(method) if field.name != "budget"}
        rule = (type(method), options)
        shared.append((rule, next((found for known, found in shared if known == rule), {})))
    return [found for _, found in shared]


class _Once:
    """An operator that computes the scores of all branches at the first call, and each of them once.

    Their calls differ in nothing but which queries are scored, and that does not change the output.
    """

    def __init__(self, operator: Operator, requests: Sequence[tuple[int | None, int]]) -> None:
        self.operator = operator
        self.requests = requests
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
        if self.output is None:
            self._compute(query, keys, values, **options)
        assert self.output is not None
        return self.output, self.scores[_counted(query, score_queries, score_step)]

    def _compute(self, query: Tensor, keys: Tensor, values: Tensor, **options: Any) -> None:
        requests = {_counted(query, *request): request for request in self.requests}
        unscored = (0, 1) in requests and len(requests) > 1
        if unscored:
            del requests[0, 1]
        if self.operator is flash_attention_with_cumulative_scores:
            self.output, scores = flash_attention_with_several_scores(query, keys, values, [*requests], **options)
            self.scores = dict(zip(requests, scores, strict=True))
        else:
            for counted, (rows, step) in requests.items():
                output, self.scores[counted] = self.operator(
                    query, keys, values, None, score_queries=rows, score_step=step, **options
                )
                self.output = output if self.output is None else self.output
        if unscored:
            self.scores[0, 1] = torch.zeros_like(next(iter(self.scores.values())))


def _counted(query: Tensor, score_queries: int | None, score_step: int) -> tuple[int, int]:
    """The rows that count and the step between them: the same for requests that mean the same."""
    n_queries = query.shape[2]
    rows = n_queries if score_queries is None else min(score_queries, n_queries)
    return rows, score_step if rows > 1 else 1
