from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity, Method


@dataclass(frozen=True)
class KeyNorm(Method):
    """Keep the keys of lowest L2 norm.

    Devoto et al. 2024, arXiv 2406.11430, section 3: keys of low norm get high attention. Norms are taken in float32: in
    bfloat16 most of them tie. The authors leave the first two layers whole; here every layer is cut, so that the budget
    is that of the other methods. One cut, after the prompt.
    """

    name: ClassVar = "key_norm"
    observes: ClassVar = "nothing"
    evicts_in_decode: ClassVar = False
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")

    def scores(self, cached: CachedKeys) -> Tensor:
        return cached.once("scores", lambda: torch.linalg.vector_norm(cached.keys, dim=-1, dtype=torch.float32).neg())

    def priorities(self, cached: CachedKeys) -> Tensor:
        return cached.observed()
