from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Method, at_least


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first `sinks` tokens and the most recent rest, after the prompt and after every decode step.

    Xiao et al. 2023, arXiv 2309.17453, section 3.2. The authors re-number positions inside the cache, which is
    `positions="compacted"`; the default leaves kept keys at their original RoPE positions, as for every method here.
    At most half the budget is sinks.
    """

    name: ClassVar = "streaming_llm"
    observes: ClassVar = "nothing"
    evicts_in_decode: ClassVar = True
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self.name, "sinks", self.sinks, 0)

    def effective(self, budget_tokens: int) -> dict[str, int]:
        return {"sinks_eff": min(self.sinks, budget_tokens // 2)}

    def priorities(self, cached: CachedKeys) -> Tensor:
        sink = cached.from_start < (cached.budget // 2).clamp(max=self.sinks)
        recency = cached.from_start.float()
        return recency.masked_fill(sink, torch.inf)
