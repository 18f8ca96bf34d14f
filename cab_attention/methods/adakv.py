from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Granularity
from cab_attention.methods.snapkv import SnapKV


@dataclass(frozen=True)
class AdaKV(SnapKV):
    """SnapKV's ranking with budgets that differ between the heads of a layer.

    Feng et al. 2024, arXiv 2407.11550 (Ada-SnapKV), as in the authors' code. Of a budget b the window w stays in every
    head. The G * (b - w) highest scores of all G heads together say how many each head would keep; a head gets
    (1 - safeguard) of that and `safeguard` of the even share b - w, rounded down, and what is left goes to the largest
    fractions, to the lower head first: over the heads together exactly G * b stay (theirs rounds each head by itself).
    Scores are summed over the window, then max-pooled over 7 keys. (kvpress keeps each head's own best `safeguard`
    share instead and lets the rest compete.) One cut, after the prompt.

    Between two forwards the kept keys lie side by side without gaps; `positions` and what attention gets are rectangles
    for the longest head of the layer, with empty slots before a shorter head's keys.
    """

    name: ClassVar = "adakv"
    granularities: ClassVar[tuple[Granularity, ...]] = ("head",)
    budgets_vary_by_head: ClassVar = True
    kernel_size: int = 7
    pooling: Literal["avg", "max"] = "max"
    safeguard: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.safeguard <= 1:
            raise ValueError(f"{self.name}: safeguard={self.safeguard!r}, allowed is a number from 0 to 1")

    def budgets(self, cached: CachedKeys) -> Tensor:
        n_heads = cached.positions.shape[1]
        n_keys = cached.count[:, :1]
        budget = torch.minimum(cached.budget, n_keys)
        window = torch.minimum(self.window_eff(cached.budget), budget)
        share = budget - window  # [B, 1, 1]
        competing = cached.valid & (cached.from_end >= window)
        ranks = self.priorities(cached).masked_fill(~competing, -torch.inf)
        # Key by key, of equal scores the lower position first, then the lower head.
        best = ranks.transpose(1, 2).flatten(1).sort(dim=-1, descending=True, stable=True).indices
        taken = (torch.arange(best.shape[1], device=best.device) < n_heads * share[:, 0]).long()
        won = torch.zeros_like(share.expand(-1, n_heads, -1)[..., 0]).scatter_add_(1, best % n_heads, taken)
        exact = (1 - self.safeguard) * won.double() + self.safeguard * share[..., 0].double()
        exact = exact.round(decimals=9)  # so that equal fractions are equal
        whole = exact.floor()
        left = n_heads * share[:, 0] - whole.sum(1, keepdim=True)
        place = (exact - whole).round(decimals=9).sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
        return (window[..., 0] + whole.long() + (place < left))[..., None]
