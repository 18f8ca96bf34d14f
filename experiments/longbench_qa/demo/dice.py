"""Random numbers that are a function of (seed, row, what for): the same on every machine and in every batch."""

import hashlib

import torch
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Dice:
    """Random numbers of rows [B]: splitmix64 of (seed, row, what for, how many-th)."""

    def __init__(self, seed: int, rows: Tensor) -> None:
        self.rows = _mix(rows.to(torch.int64) + int(_mix(torch.tensor(seed))))

    def bits(self, purpose: str, n: int) -> Tensor:
        """[B, n], each from 0 to 2^62 - 1."""
        tag = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:7])
        place = torch.arange(n, device=self.rows.device)
        return _shift(_mix(_mix(self.rows + tag)[:, None] + place), 2)

    def below(self, purpose: str, bound: int, n: int) -> Tensor:
        """[B, n], uniform from 0 to bound - 1."""
        return self.bits(purpose, n) % bound

    def permutation(self, purpose: str, size: int, n: int, there: Tensor | None = None) -> Tensor:
        """[B, n]: the first n of a random order of range(size), those that are not `there` [B, size] last."""
        bits = self.bits(purpose, size)
        if there is not None:
            bits = torch.where(there, bits, bits | (1 << 62))
        return bits.sort(dim=1, stable=True).indices[:, :n]


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), on int64 that wraps around."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical, not arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)
