import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity, Method, at_least

MOST_FUTURE = 2**16  # a rotation is made for each of these positions


@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Keep the keys that coming queries are expected to look at, weighted by the length of their values, and sinks.

    Devoto et al. 2025, arXiv 2510.00636, section 2.2: the prompt's queries, un-rotated, have mean and covariance per
    query head; under the average rotation over the next `n_future` positions these are mu and S of the queries to
    come, taken as Gaussian. A key k is expected the weight exp(k.mu / sqrt(D) + k S k / (2 D)), normalised over the
    keys; its score is the mean over the group's query heads times the L2 norm of its value. The first `sinks` tokens
    stay: they are not scored and are no part of the normalisation; and the first 4 queries are no part of mean and
    covariance, as in the authors' kvpress 0.5.5. At most half the budget is sinks; what of the first tokens is then
    no sink competes. A model that scales its logits otherwise than by sqrt(D) keeps its scale; caps are left out. The
    paper also adds 0.02 to the normalised weights and lets heads share a budget; kvpress by default does neither. One
    cut, after the prompt. `n_future` is 65,536 at most.
    """

    name: ClassVar = "expected_attention"
    observes: ClassVar = "queries"
    evicts_in_decode: ClassVar = False
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")
    n_future: int = 512
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self.name, "n_future", self.n_future, 1, MOST_FUTURE)
        at_least(self.name, "sinks", self.sinks, 0)

    def effective(self, budget_tokens: int) -> dict[str, int]:
        return {"sinks_eff": min(self.sinks, budget_tokens // 2)}

    def scores(self, cached: CachedKeys) -> Tensor:
        """float32 [B, G, K], 0 for sinks and empty slots."""
        if cached.queries is None:
            raise RuntimeError("the cache gathered no queries for a method that ranks by them")
        mean, covariance = cached.queries(self.n_future)
        competes = cached.valid & ~self._is_sink(cached)
        return expected_attention_scores(cached.keys, cached.values, mean, covariance, competes)

    def priorities(self, cached: CachedKeys) -> Tensor:
        return cached.observed().masked_fill(self._is_sink(cached), torch.inf)

    def _is_sink(self, cached: CachedKeys) -> Tensor:
        return cached.from_start < (cached.budget // 2).clamp(max=self.sinks)


def expected_attention_scores(
    keys: Tensor, values: Tensor, mean: Tensor, covariance: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The attention that keys can expect of Gaussian queries, times the L2 norm of their values.

    Args:
        keys: [B, G, K, D], after RoPE.
        values: [B, G, K, Dv].
        mean: [B, H, D] of the queries to come, rotated; query heads of a group lie together.
        covariance: [B, H, D, D], rotated as well.
        valid: bool [B, G, K], the keys that are scored; None for all.

    Returns:
        float32 [B, G, K], 0 where not valid.
    """
    n_heads, dim = keys.shape[1], keys.shape[3]
    keys = keys.float()
    invalid = None if valid is None else ~valid
    groups = (moment.float().unflatten(1, (n_heads, -1)).unbind(2) for moment in (mean, covariance))
    weights = []
    for mu, spread in zip(*groups, strict=True):  # one query head of each group: [B, G, D], [B, G, D, D]
        logits = (keys @ mu[..., None])[..., 0] / math.sqrt(dim) + ((keys @ spread) * keys).sum(-1) / (2 * dim)
        if invalid is not None:
            logits = logits.masked_fill(invalid, -torch.inf)
        weights.append(logits.softmax(-1))
    scores = torch.stack(weights).mean(0) * values.float().norm(dim=-1)
    return scores if invalid is None else scores.masked_fill(invalid, 0.0)
