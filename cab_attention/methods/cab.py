import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cab_attention import curvature
from cab_attention.methods.base import CachedKeys, Granularity, Method, at_least
from cab_attention.methods.score_queries import check_score_queries, parse_score_queries

BRIDGES = ("curvature", "redundancy", "median")


@dataclass(frozen=True)
class CAB(Method):
    """Keep recent tokens (local), heavy hitters (importance) and keys that connect parts of the text (bridge).

    Of a budget b: local = floor(local_ratio * b), at least 1, the last tokens; bridge = floor(bridge_ratio * b);
    importance = the rest, the highest cumulative scores (as H2O's) of the keys not local. Bridge keys come from what is
    left, by one of

    * `curvature`: blocks of `block_size` keys, each represented by its key of largest norm, form a graph of mutual
      attention; blocks of lowest mean Forman-Ricci curvature first.
    * `redundancy`: the same graph, blocks of highest mean W - redundancy * (W @ W) first. This favours bridges whose
      keys are longer than the others'; one of ordinary length can come last.
    * `median`: keys whose cumulative score is nearest the median of what is left.

    Of a chosen block all keys not yet kept are taken, the last block's by cumulative score. Below 6 blocks there is no
    graph, and the bridge share goes to importance. The whole rule runs again after every decode step. Heads or layers
    that choose together (`granularity`) share one graph, over their keys side by side. `score_queries` makes the
    cumulative scores from fewer queries: "last:W" or "every:S".
    """

    name: ClassVar = "cab"
    observes: ClassVar = "all"
    evicts_in_decode: ClassVar = True
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")
    local_ratio: float = 0.3
    bridge_ratio: float = 0.2
    importance_ratio: float = 0.5
    bridge: Literal["curvature", "redundancy", "median"] = "curvature"
    block_size: int = 32
    redundancy: float = 0.5
    score_queries: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = (self.local_ratio, self.bridge_ratio, self.importance_ratio)
        if not (min(ratios) >= 0 and abs(sum(ratios) - 1) <= 1e-9):  # NaN is neither
            raise ValueError(
                f"{self.name}: local_ratio, bridge_ratio, importance_ratio = {ratios}: "
                "allowed are numbers >= 0 that sum to 1"
            )
        if self.bridge not in BRIDGES:
            raise ValueError(f"{self.name}: bridge={self.bridge!r}, allowed is one of {', '.join(BRIDGES)}")
        at_least(self.name, "block_size", self.block_size, 1)
        if not 0 <= self.redundancy < math.inf:
            raise ValueError(f"{self.name}: redundancy={self.redundancy!r}, allowed is a number >= 0")
        check_score_queries(self.name, self.score_queries, self.evict_in_prefill)

    @property
    def ranks_by_keys(self) -> bool:
        return self.bridge != "median"

    def observed_queries(self) -> tuple[int | None, int]:
        return parse_score_queries(self.name, self.score_queries)

    def shares(self, budget_tokens: int) -> tuple[int, int, int]:
        """(local, bridge, importance) in tokens; they sum to the budget."""
        local = max(1, math.floor(self.local_ratio * budget_tokens))
        bridge = min(budget_tokens - local, math.floor(self.bridge_ratio * budget_tokens))
        return local, bridge, budget_tokens - local - bridge

    def effective(self, budget_tokens: int) -> dict[str, int]:
        return {"window_eff": self.shares(budget_tokens)[0]}

    def priorities(self, cached: CachedKeys) -> Tensor:
        scores = cached.observed()
        # floor() of the double product, as in `shares`, without fetching the budget from the device.
        wanted = cached.budget.double()
        n_local = torch.floor(self.local_ratio * wanted).clamp(min=1)
        n_bridge = torch.minimum(torch.floor(self.bridge_ratio * wanted), wanted - n_local)
        by_score = cached.once("by_score", lambda: _falling(scores))
        by_block = None
        if self.bridge != "median":
            by_block, has_graph = cached.once("by_block", lambda: self._by_block_then_score(cached, by_score))
            n_bridge = torch.where(has_graph, n_bridge, 0.0)
        n_importance = wanted - n_local - n_bridge

        local = (cached.from_end < n_local) & cached.valid
        free = cached.valid & ~local
        important = _first(by_score, free, n_importance)
        free &= ~important
        if by_block is None:
            # In float64 the two middle keys of an even count are exactly as near: a tie, the lower position stays.
            exact = scores.double()
            bridge_order = _falling((exact - _median(exact, free)).abs().neg())
        else:
            bridge_order = by_block
        bridge = _first(bridge_order, free, n_bridge)
        return local * 3.0 + important * 2.0 + bridge * 1.0

    def _by_block_then_score(self, cached: CachedKeys, by_score: Tensor) -> tuple[Tensor, Tensor]:
        """Slots [B, G, K] by the place of their block, then as in `by_score`; whether there is a graph [B, G, 1]."""
        place, has_graph = self.block_order(cached)
        by_block = place.gather(-1, by_score).sort(dim=-1, stable=True).indices
        return by_score.gather(-1, by_block), has_graph

    def block_order(self, cached: CachedKeys) -> tuple[Tensor, Tensor]:
        """The place of each key's block, 0 = strongest bridge [B, G, K], and whether there is a graph [B, G, 1]."""
        ranks = None if self.granularity == "head" else cached.ranks  # of a set's keys each rank has a part
        representatives, exists = curvature.block_representatives(cached.keys, cached.valid, self.block_size, ranks)
        log_weights = curvature.block_log_weights(representatives, exists)
        if self.bridge == "curvature":
            values = curvature.bridge_order_by_curvature(log_weights)
        else:
            values = curvature.bridge_order_by_redundancy(log_weights, self.redundancy)
        ranked = values.masked_fill(~exists, torch.inf).argsort(dim=-1, stable=True)
        place = ranked.argsort(-1)
        block = (cached.from_start.clamp(min=0)) // self.block_size
        return place.gather(-1, block), exists.sum(-1, keepdim=True) >= curvature.FEWEST_BLOCKS


def _falling(rank: Tensor) -> Tensor:
    """Slots [B, G, K] by falling rank, ties to the lower position."""
    return rank.sort(dim=-1, descending=True, stable=True).indices


def _first(order: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Bool [B, G, K]: the first `count` [B, G or 1, 1] slots in `order` that are `among` these."""
    competing = among.gather(-1, order)
    return torch.empty_like(among).scatter_(-1, order, competing & (competing.cumsum(-1) <= count))


def _median(scores: Tensor, among: Tensor) -> Tensor:
    """Median [B, G, 1] of the scores `among` these: of an even count the mean of the two in the middle."""
    ascending = scores.masked_fill(~among, torch.inf).sort(-1).values
    count = among.sum(-1, keepdim=True)
    low, high = ((count - 1) // 2).clamp(min=0), (count // 2).clamp(max=scores.shape[-1] - 1)
    return (ascending.gather(-1, low) + ascending.gather(-1, high)) / 2
