import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cab_attention.methods.base import CachedKeys, Method


@dataclass(frozen=True)
class Random(Method):
    """Keep budget - 1 keys drawn uniformly and the last token: the floor that a method has to beat.

    The generator is seeded by (seed, sample, layer, head), so a resumed, batched or tensor-parallel run draws the same.
    """

    name: ClassVar = "random"
    observes: ClassVar = "nothing"
    evicts_in_decode: ClassVar = False
    evicts_in_chunks: ClassVar = False  # drawn again from what is left, keys would not have equal chances
    seed: int = 0

    def priorities(self, cached: CachedKeys) -> Tensor:
        n_batch, n_heads, n_keys = cached.positions.shape
        draws = torch.zeros(n_batch, n_heads, n_keys)
        counts = cached.count[..., 0].tolist()
        first_head = 0 if cached.ranks is None else cached.ranks.rank * n_heads
        for row in range(n_batch):
            for head in range(n_heads):
                # One number a real token, so that neither padding nor the other rows move a row's draw.
                count = counts[row][head]
                generator = self._generator(cached.sample_ids[row], cached.layer_index, first_head + head)
                draws[row, head, n_keys - count :] = torch.rand(count, generator=generator)
        return draws.to(cached.positions.device).masked_fill(cached.from_end == 0, 2.0)

    def _generator(self, sample_id: str, layer: int, head: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{sample_id}/{layer}/{head}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
