from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from cab_attention.methods.base import CachedKeys, Method


@dataclass(frozen=True)
class Full(Method):
    """Keep everything: the full cache, the reference of every curve."""

    name: ClassVar = "full"
    observes: ClassVar = "nothing"
    evicts_in_decode: ClassVar = False
    budget: str = field(default="full", init=False)

    def priorities(self, cached: CachedKeys) -> Tensor:
        return cached.valid.float()
