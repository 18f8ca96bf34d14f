"""The keys and values that one layer holds, and where in the sequence they stood."""

from collections.abc import Callable

import torch
from torch import Tensor

from cab_attention.cut import gather_slots
from cab_attention.ragged import RaggedKeys


class KeyStore:
    """Keys and values in slots, in text order; a head with fewer than the longest has empty slots at the front.

    Attributes:
        positions: int64 [B, G, K], original positions, -1 for an empty slot.
        has_empty_slots: some slot may be empty.
        has_gaps: something was evicted.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        """Empty, for keys [B, G, n, D] and values [B, G, n, Dv] such as these."""
        self._keys: Tensor | None = keys[:, :, :0]
        self._values: Tensor | None = values[:, :, :0]
        self._ragged: RaggedKeys | None = None  # between two forwards, where heads hold different numbers
        self.positions = torch.empty(*keys.shape[:2], 0, dtype=torch.int64, device=keys.device)
        self.has_empty_slots = False
        self.has_gaps = False

    @property
    def keys(self) -> Tensor:
        """[B, G, K, D]; laid out anew at each look while it is packed."""
        return self._ragged_or(self._keys, 0)

    @property
    def values(self) -> Tensor:
        """[B, G, K, Dv]; likewise."""
        return self._ragged_or(self._values, 1)

    def _ragged_or(self, held: Tensor | None, which: int) -> Tensor:
        if held is not None:
            return held
        assert self._ragged is not None
        return self._ragged.laid_out()[which]

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self._ragged = keys, values, None

    def append(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Add keys and values [B, G, n, D] at positions `first` to first + n."""
        n_batch, n_heads, n_new, _ = keys.shape
        new = torch.arange(first, first + n_new, device=keys.device).expand(n_batch, n_heads, n_new)
        if self._ragged is not None:
            self._keys, self._values = self._ragged.append(keys, values)
        elif self.positions.shape[2] == 0:
            self._hold(keys, values)
        else:
            self._hold(torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2))
        self.positions = new if self.positions.shape[2] == 0 else torch.cat([self.positions, new], dim=2)

    def empty_padding(self, is_real: Tensor) -> None:
        """The slots of the last n tokens where `is_real` [B, n] is False hold nothing."""
        n_new = is_real.shape[1]
        new = torch.where(is_real[:, None], self.positions[:, :, -n_new:], -1)
        self.positions = torch.cat([self.positions[:, :, :-n_new], new], dim=2)
        self.has_empty_slots = True

    def drop_before(self, first: int, reach: int) -> slice | None:
        """Empty the slots of keys before position `first`, and free those surely empty.

        `reach`: positions from `first` to the newest. Returns the slots that are left, None if they are all.
        """
        self.positions = torch.where(self.positions >= first, self.positions, -1)
        self.has_empty_slots = True
        # Positions rise strictly, so only the last `reach` slots can hold a key from `first` on.
        if self.positions.shape[2] <= reach:
            return None
        last = slice(self.positions.shape[2] - reach, None)
        self._hold(self.keys[:, :, last].contiguous(), self.values[:, :, last].contiguous())
        self.positions = self.positions[:, :, last]
        return last

    def keep(self, slots: Tensor, empty: Tensor | None) -> None:
        """Keep the slots [B, G, W], in text order; those `empty` at the front hold nothing (None: all hold a key)."""
        self._hold(gather_slots(self.keys, slots), gather_slots(self.values, slots))
        self.positions = self.positions.gather(2, slots)
        if empty is not None:
            self.positions = self.positions.masked_fill(empty, -1)
        self.has_gaps = True

    def own(self) -> None:
        """Hold no larger tensor alive, of which keys or values are a view (a fused projection)."""
        self._hold(self.keys.contiguous(), self.values.contiguous())

    def pack(self) -> None:
        """Hold nothing for empty slots until the next `append`. Nothing may be evicted from then on."""
        if self._ragged is None:
            self._ragged = RaggedKeys(self.keys, self.values, self.positions >= 0)
            self.has_empty_slots = True
        self._keys = self._values = None

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the batch dimension (beams are reordered, repeated, dropped)."""
        packed = self._keys is None
        self._hold(select(self.keys), select(self.values))
        self.positions = select(self.positions)
        if packed:
            self.pack()

    @property
    def nbytes(self) -> int:
        """Storage of keys and values in bytes."""
        if self._keys is None or self._values is None:
            assert self._ragged is not None
            return self._ragged.nbytes
        return self._keys.nbytes + self._values.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Storage of positions, and of what says which key is whose, in bytes."""
        return self.positions.nbytes + (0 if self._ragged is None else self._ragged.index_bytes)
