from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity, at_least
from cab_attention.methods.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's ranking with budgets that fall from layer to layer.

    Cai et al. 2024, arXiv 2406.02069. Of a budget b the window w stays in every layer. The other C = b - w fall
    linearly from 2C - C / beta in the first layer to C / beta in the last; where the first would keep more than the
    N - w keys there are, it keeps those and the last 2C - (N - w). Numbers are rounded down, and what is left goes to
    the largest fractions, to the lower layer first: over the layers together exactly the budget stays. (The authors'
    code rounds the step between layers down, by which up to 12 % more stays at 32 layers, and gives all layers the same
    where N < 2C; their LongBench runs have window 8, kernel 7 and max.) Where some layers slide, layers of a kind have
    a pyramid of their own.
    """

    name: ClassVar = "pyramidkv"
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer")
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self.name, "beta", self.beta, 1)

    def budgets(self, cached: CachedKeys) -> Tensor:
        n_keys = cached.count[:, :1]  # the same in every head
        budget = torch.minimum(cached.budget, n_keys)
        window = torch.minimum(self.window_eff(cached.budget), budget)
        share, n_layers = budget - window, cached.peers[1]
        if n_layers == 1:
            return budget
        # In whole numbers, beta * (n_layers - 1) times as large, so that equal fractions are equal.
        most = torch.minimum((2 * self.beta - 1) * share, self.beta * (n_keys - window))
        least = 2 * self.beta * share - most
        layers = torch.arange(n_layers, device=budget.device)
        wanted = most * (n_layers - 1) - layers * (most - least)  # [B, 1, L]
        whole, fraction = wanted // (self.beta * (n_layers - 1)), wanted % (self.beta * (n_layers - 1))
        left = n_layers * share - whole.sum(-1, keepdim=True)
        place = fraction.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        given = whole + (place < left)
        return window + given[..., cached.peers[0], None]
