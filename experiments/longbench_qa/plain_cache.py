"""transformers' own full cache, for its own sdpa attention: what the full cache costs where nothing of ours runs."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache

from cab_attention import Full


class PlainCache(DynamicCache):
    """A `DynamicCache` that says of itself what an `EvictingCache` with `Full` does."""

    def __init__(self, config: PreTrainedConfig, method: Full) -> None:
        super().__init__(config=config)
        self.method = method

    def kept_positions(self) -> list[Tensor]:
        """By layer: int64 [B, G, kept]. Layers with a sliding window have let go of what is behind it."""
        seen, found = self.get_seq_length(), []
        for layer in self.layers:
            batch, heads, kept, _ = layer.keys.shape
            found.append(torch.arange(seen - kept, seen, device=layer.keys.device).expand(batch, heads, kept))
        return found

    @property
    def cache_bytes(self) -> int:
        """Storage of K and V over all layers, in bytes."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def bookkeeping_bytes(self) -> int:
        """Nothing beside K and V."""
        return 0

    def check_saw(self, n_tokens: int) -> None:
        """Raise RuntimeError unless the cache saw `n_tokens`."""
        if self.get_seq_length() != n_tokens:
            raise RuntimeError(f"the cache saw {self.get_seq_length()} tokens of {n_tokens}")
