"""Which slots of a cache stay: a method's ranking, for each head or for heads and layers that choose together.

Layers that choose together may lie on several devices; what they choose is made on the last one's.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Method
from cab_attention.tensor_parallel import HeadRanks


def slots_to_keep(method: Method, layers: Sequence[CachedKeys], width: int, fills: bool = False) -> Tensor:
    """Slots to keep: int64 [B, G or 1, W] in ascending order, -1 (empty) at the front.

    Args:
        method: ranks the keys.
        layers: the layer to cut, or all layers where they choose one set together (`granularity="model"`); the heads
            of what chooses together hold the same positions, on whatever ranks they lie.
        width: W where every layer and head has the same budget, else W is the largest budget.
        fills: no slot is empty, and none will be: all rows and heads have as many keys, and one budget below that.
    """
    worth = [replace(cached, scores=method.scores(cached)) for cached in layers]
    divided = None  # the ranks of heads that choose for themselves, but not alone
    if method.granularity != "head":
        ranked = _as_one_head(method, worth)
    elif method.budgets_vary_by_head and worth[0].ranks is not None:
        divided, ranked = worth[0].ranks, _heads_of_all_ranks(worth[0], worth[0].ranks)
    else:
        ranked = worth[0]
    budgets = method.budgets(ranked)
    if budgets is not ranked.budget:
        width = int(budgets.max())
    priorities = method.priorities(ranked)
    if fills:
        slots = _falling(priorities)[..., :width].sort(-1).values
    else:
        slots = select_slots(priorities, ranked.valid, budgets, width)
    return slots if divided is None else divided.own_heads(slots)


def _heads_of_all_ranks(cached: CachedKeys, ranks: HeadRanks) -> CachedKeys:
    """For a method whose first cut is its only one: until then all heads hold the same positions."""
    nothing = cached.keys[:, :1, :, :0].expand(-1, ranks.size * cached.keys.shape[1], -1, -1)
    positions = cached.positions[:, :1].expand(-1, nothing.shape[1], -1)
    return replace(cached, keys=nothing, values=nothing, positions=positions, scores=ranks.gather(cached.observed()))


def _as_one_head(method: Method, layers: Sequence[CachedKeys]) -> CachedKeys:
    last = layers[-1]
    device = last.positions.device

    def total(cached: CachedKeys) -> Tensor:
        scores = cached.observed()
        return (scores if cached.ranks is None else cached.ranks.gather(scores)).sum(1, keepdim=True).to(device)

    scores = sum(map(total, layers[1:]), total(layers[0]))
    keys = nothing = last.keys[:, :1, :, :0]
    if method.ranks_by_keys:
        keys = torch.cat([_side_by_side(cached.keys).to(device) for cached in layers], dim=-1)
    return replace(
        last,
        keys=keys,
        values=nothing,
        positions=last.positions[:, :1],
        scores=scores,
    )


def _side_by_side(heads: Tensor) -> Tensor:
    """[B, G, K, D] -> [B, 1, K, G * D]."""
    return heads.transpose(1, 2).flatten(2)[:, None]


def select_slots(priorities: Tensor, valid: Tensor, budgets: Tensor, width: int) -> Tensor:
    """Slots to keep: int64 [B, G, width] in ascending order, -1 (empty) at the front.

    Of the valid slots the `budgets` [B, 1 or G, 1] of highest priority stay; among equals the lower slot.
    """
    ranked = _falling(priorities.masked_fill(~valid, -torch.inf))[..., :width]
    wanted = torch.arange(ranked.shape[-1], device=ranked.device) < budgets
    return torch.where(wanted & valid.gather(-1, ranked), ranked, -1).sort(-1).values


def _falling(priorities: Tensor) -> Tensor:
    return priorities.sort(dim=-1, descending=True, stable=True).indices


def set_apart(positions: Tensor, pinned: range) -> tuple[Tensor, Tensor]:
    """Slots [B, G, .] that hold the positions `pinned`, all of which are there, and the others, each in order."""
    is_pinned = (positions >= pinned.start) & (positions < pinned.stop)
    pinned_first = is_pinned.int().argsort(dim=-1, descending=True, stable=True)
    return pinned_first[..., : len(pinned)], pinned_first[..., len(pinned) :]


def gather_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """[B, G, K, D] at slots [B, G, W] -> [B, G, W, D]."""
    return tensor.gather(2, slots[..., None].expand(-1, -1, -1, tensor.shape[-1]))
