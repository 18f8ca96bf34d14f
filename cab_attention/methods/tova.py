from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity, Method


@dataclass(frozen=True)
class TOVA(Method):
    """Keep what the last query looks at, the same keys for all heads of a layer.

    Oren et al. 2024, arXiv 2401.06104, section 4: the last query's softmax weights, averaged over all heads (here:
    summed), rank the keys, after the prompt and again after every decode step. No sinks and no recent window are
    forced.
    """

    name: ClassVar = "tova"
    observes: ClassVar = "last"
    evicts_in_decode: ClassVar = True
    granularities: ClassVar[tuple[Granularity, ...]] = ("layer",)
    granularity: Granularity = field(default="layer", kw_only=True)

    def priorities(self, cached: CachedKeys) -> Tensor:
        return cached.observed()
