"""Tensor parallelism: which of a layer's heads this process has, and what a choice over all of them needs.

transformers divides query and KV heads evenly over the ranks, in order, and leaves every rank's hidden states equal.
Whatever a method decides head by head needs nothing more. Where heads choose together, each rank gathers the scores of
all heads, vectors as long as the cache, and makes the same choice from the same numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class HeadRanks:
    """The ranks over which the heads of a layer lie, equally many on each. All make the same calls in the same order.

    Attributes:
        group: their process group.
        rank: this process's place in it.
        size: how many there are.
    """

    group: distributed.ProcessGroup
    rank: int
    size: int

    def gather(self, own: Tensor, dim: int = 1) -> Tensor:
        """Every rank's tensor of one shape, joined along `dim` (1: heads) in order; the same numbers on every rank."""
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        distributed.all_gather(parts, own, group=self.group)
        return torch.cat(parts, dim)

    def own_heads(self, of_all: Tensor) -> Tensor:
        """[B, all heads, ...] -> [B, this rank's heads, ...]."""
        return of_all.chunk(self.size, dim=1)[self.rank]


def ranks_of(module: nn.Module, n_kv_heads: int) -> HeadRanks | None:
    """The ranks that share an attention module's KV heads, `n_kv_heads` of which are here; None if all are here.

    Raises ValueError if the heads are divided in another way.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    from torch.distributed.tensor import DTensor  # takes a second to import

    mesh = next((weight.device_mesh for weight in module.parameters() if isinstance(weight, DTensor)), None)
    # Some models' plans leave attention whole on every rank (Phi-3), and FSDP's weights are DTensors too.
    if mesh is None or n_kv_heads == (n_all := _kv_heads(module.config)):
        return None
    if mesh.ndim != 1 or n_kv_heads * mesh.size() != n_all:
        raise ValueError(
            f"{type(module).__name__}: {n_kv_heads} of {n_all} KV heads on one of {mesh.size()} ranks, allowed is an "
            "even share"
        )
    return HeadRanks(mesh.get_group(), mesh.get_local_rank(), mesh.size())


def check_heads_divide(config: Any, n_ranks: int) -> None:
    """Raise ValueError unless a model of this config has as many query heads, and KV heads, for each of the ranks."""
    for name, n_heads in (("attention", config.num_attention_heads), ("KV", _kv_heads(config))):
        if n_heads % n_ranks:
            fitting = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
            raise ValueError(
                f"tensor parallelism over {n_ranks} ranks, {config.model_type} has {n_heads} {name} heads: "
                f"allowed is a number that divides them, {', '.join(map(str, fitting))}"
            )


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads
