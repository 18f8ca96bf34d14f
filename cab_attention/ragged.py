"""Keys and values of a layer whose heads keep different numbers of them, stored without gaps between two forwards."""

import torch
from torch import Tensor


class RaggedKeys:
    """What a cut left, side by side; what came after it, rectangular, since every head gets each new token.

    Attention takes a rectangle, so one layer at a time is laid out again, which is the copy that appending to a
    rectangle would be too. Nothing may be evicted from it.

    Args:
        keys, values: [B, G, K, D], K the longest head's keys; of one dtype and head dim.
        valid: bool [B, G, K], which slots hold one.
    """

    def __init__(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        self._shape = valid.shape
        # One index for keys and values, and the row of slots that each lies in. Waits for the GPU: once, at the cut.
        self._slots = valid.expand(2, *valid.shape).flatten().nonzero()[:, 0]
        self._rows = self._slots // valid.shape[2]
        self._kept = torch.stack([keys, values]).flatten(0, 3)[self._slots]
        self._later = torch.stack([keys[:, :, :0], values[:, :, :0]])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, G, n, D] of new tokens, and lay out all: [B, G, K + n so far, D]."""
        self._later = torch.cat([self._later, torch.stack([keys, values])], dim=3)
        return self.laid_out()

    def laid_out(self) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, K + tokens since, D], zeros in empty slots."""
        (n_batch, n_heads, n_slots), n_later, dim = self._shape, self._later.shape[3], self._kept.shape[1]
        n_all = n_slots + n_later
        rectangles = self._kept.new_zeros(2 * n_batch * n_heads * n_all, dim)
        rectangles.index_copy_(0, torch.add(self._slots, self._rows, alpha=n_later), self._kept)
        rectangles = rectangles.view(2, n_batch, n_heads, n_all, dim)
        rectangles[:, :, :, n_slots:] = self._later
        return rectangles[0], rectangles[1]

    @property
    def nbytes(self) -> int:
        """Storage of keys and values in bytes."""
        return self._kept.nbytes + self._later.nbytes

    @property
    def index_bytes(self) -> int:
        """Storage of what says which key is whose, in bytes."""
        return self._slots.nbytes + self._rows.nbytes
