"""Which slots of a cache stay: a method's ranking, for each head or for heads and layers that choose together."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Method


def slots_to_keep(method: Method, layers: Sequence[CachedKeys], width: int) -> Tensor:
    """Slots to keep: int64 [B, G or 1, W] in ascending order, -1 (empty) at the front.

    Args:
        method: ranks the keys.
        layers: the layer to cut, or all layers where they choose one set together (`granularity="model"`); the heads
            of what chooses together hold the same positions.
        width: W where every layer and head has the same budget, else W is the largest budget.
    """
    worth = [replace(cached, scores=method.scores(cached)) for cached in layers]
    ranked = worth[0] if method.granularity == "head" else _as_one_head(method, worth)
    budgets = method.budgets(ranked)
    if budgets is not ranked.budget:
        width = int(budgets.max())
    return select_slots(method.priorities(ranked), ranked.valid, budgets, width)


def _as_one_head(method: Method, layers: Sequence[CachedKeys]) -> CachedKeys:
    scores = sum((cached.observed().sum(1, keepdim=True) for cached in layers[1:]), layers[0].observed().sum(1, True))
    last = layers[-1]
    nothing = last.keys[:, :1, :, :0]
    return replace(
        last,
        keys=torch.cat([_side_by_side(cached.keys) for cached in layers], dim=-1) if method.ranks_by_keys else nothing,
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
    ranked = priorities.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    wanted = torch.arange(ranked.shape[-1], device=ranked.device) < budgets
    return torch.where(wanted & valid.gather(-1, ranked), ranked, -1).sort(-1).values


def set_apart(positions: Tensor, pinned: range) -> tuple[Tensor, Tensor]:
    """Slots [B, G, .] that hold the positions `pinned`, all of which are there, and the others, each in order."""
    is_pinned = (positions >= pinned.start) & (positions < pinned.stop)
    pinned_first = is_pinned.int().argsort(dim=-1, descending=True, stable=True)
    return pinned_first[..., : len(pinned)], pinned_first[..., len(pinned) :]


def gather_slots(tensor: Tensor, slots: Tensor) -> Tensor:
    """[B, G, K, D] at slots [B, G, W] -> [B, G, W, D]."""
    return tensor.gather(2, slots[..., None].expand(-1, -1, -1, tensor.shape[-1]))
