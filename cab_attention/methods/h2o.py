from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity, Method, at_least
from cab_attention.methods.score_queries import check_score_queries, parse_score_queries


@dataclass(frozen=True)
class H2O(Method):
    """Keep the heavy hitters, the keys of highest cumulative score, and a recent window.

    Zhang et al. 2023, arXiv 2306.14048, section 4: s[j] is the plain sum over all queries i of the softmax weight
    A[i, j], with no normalisation by the number of queries that see j; a group's score is the sum over its query
    heads. The recent window takes `recent` tokens, half the budget by default and at most. Scores go on accumulating
    in decode, and every step cuts again. The paper's algorithm also cuts within the prompt, key by key; here the prompt
    is attended in full first (`evict_in_prefill="chunk"` cuts between its chunks). `score_queries` makes the scores
    from fewer queries: "last:W" or "every:S".
    """

    name: ClassVar = "h2o"
    observes: ClassVar = "all"
    evicts_in_decode: ClassVar = True
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")
    recent: int | None = None
    score_queries: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None:
            at_least(self.name, "recent", self.recent, 0)
        check_score_queries(self.name, self.score_queries, self.evict_in_prefill)

    def observed_queries(self) -> tuple[int | None, int]:
        return parse_score_queries(self.name, self.score_queries)

    def effective(self, budget_tokens: int) -> dict[str, int]:
        half = budget_tokens // 2
        return {"window_eff": half if self.recent is None else min(self.recent, half)}

    def priorities(self, cached: CachedKeys) -> Tensor:
        window = cached.budget // 2
        if self.recent is not None:
            window = window.clamp(max=self.recent)
        return cached.observed().masked_fill(cached.from_end < window, torch.inf)
