from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from cab_attention.methods.base import CachedKeys, Granularity, Method, at_least, one_of


@dataclass(frozen=True)
class SnapKV(Method):
    """Keep what the last queries of the prompt looked at, and those last tokens.

    Li et al. 2024, arXiv 2404.14469, section 4: the softmax weights of the last `window` queries are summed over
    queries and over a group's query heads, then pooled over neighbouring keys, so that what is kept comes in clusters.
    The keys before the window compete; the window stays. Window 32, kernel 5 and average pooling are the defaults of
    the authors' code; the paper pools by maximum, and their LongBench runs use kernel 7 and max. Their code keeps a set
    for each query head; here the query heads of a group share one, as they share the keys. At most half the budget is
    window; all `window` queries are observed at any budget. One cut, after the prompt.
    """

    name: ClassVar = "snapkv"
    observes: ClassVar = "window"
    evicts_in_decode: ClassVar = False
    evicts_in_chunks: ClassVar = False
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")
    window: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self.name, "window", self.window, 1)
        at_least(self.name, "kernel_size", self.kernel_size, 1)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"{self.name}: kernel_size={self.kernel_size}, allowed is an odd number")
        one_of(self.name, "pooling", self.pooling, ("avg", "max"))

    def observed_queries(self) -> tuple[int | None, int]:
        return self.window, 1

    def effective(self, budget_tokens: int) -> dict[str, int]:
        return {"window_eff": min(self.window, budget_tokens // 2)}

    def window_eff(self, budget: Tensor) -> Tensor:
        """int64, tokens of the window that always stay, of a budget: at most half."""
        return (budget // 2).clamp(max=self.window)

    def priorities(self, cached: CachedKeys) -> Tensor:
        in_window = cached.from_end < self.window_eff(cached.budget)
        # Pooling sees zeros beyond the competing keys on both sides; scores are never negative, so this suits max too.
        competing = cached.observed().masked_fill(in_window | ~cached.valid, 0.0)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(competing, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.masked_fill(in_window, torch.inf)
