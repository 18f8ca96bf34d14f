"""Running mean and covariance of a layer's queries, gathered forward by forward."""

from collections.abc import Callable

import torch
from torch import Tensor

from cab_attention.rotary import Rotary

# Tokens whose queries are held in float32 at a time.
BLOCK = 4096


class QueryMoments:
    """Mean and covariance of each query head's un-rotated queries over the real tokens seen so far.

    Each row's first `skip` real tokens do not count: their queries are outliers (Devoto et al. 2025, arXiv 2510.00636;
    its kvpress code drops as many as it keeps sinks). The covariance divides by the number of queries n, not n - 1, as
    kvpress does. All in float32. Blocks of queries are centred on their own mean and joined by the update of Chan,
    Golub and LeVeque (1983), so that no large sums cancel.

    Args:
        skip: real tokens at the start of a row that do not count.
    """

    def __init__(self, skip: int = 4) -> None:
        self.skip = skip
        self._n_real: Tensor | None = None  # int64 [B], real tokens seen, skipped ones included
        self._mean: Tensor | None = None  # [B, H, D]
        self._squares: Tensor | None = None  # [B, H, D, D], sum of outer products of centred queries

    def add(self, queries: Tensor, real: Tensor | None = None) -> None:
        """Take in un-rotated queries [B, H, n, D]; `real` bool [B, n] is False for padding, None if there is none."""
        if real is None:
            real = torch.ones(len(queries), queries.shape[2], dtype=torch.bool, device=queries.device)
        for block, is_real in zip(queries.split(BLOCK, 2), real.split(BLOCK, 1), strict=True):
            self._add_block(block, is_real)

    def add_rotated(self, queries: Tensor, positions: Tensor, rotary: Rotary, real: Tensor | None = None) -> None:
        """Take in queries [B, H, n, D] as attention sees them, rotated to RoPE `positions` int64 [B, n]."""
        if real is None:
            real = torch.ones(len(queries), queries.shape[2], dtype=torch.bool, device=queries.device)
        blocks = queries.split(BLOCK, 2), positions.split(BLOCK, 1), real.split(BLOCK, 1)
        for block, at, is_real in zip(*blocks, strict=True):
            self._add_block(rotary.rotate(block.float(), -at[:, None]), is_real)

    def _add_block(self, queries: Tensor, real: Tensor) -> None:
        if self._n_real is None or self._mean is None or self._squares is None:
            n_batch, n_heads, _, dim = queries.shape
            self._n_real = torch.zeros(n_batch, dtype=torch.int64, device=queries.device)
            self._mean = torch.zeros(n_batch, n_heads, dim, device=queries.device)
            self._squares = torch.zeros(n_batch, n_heads, dim, dim, device=queries.device)
        counts = real & (self._n_real[:, None] + real.cumsum(1) > self.skip)
        ignored = ~counts[:, None, :, None]
        n_before, n_block = self._n_counted(), counts.sum(1)
        share = (n_block / (n_before + n_block).clamp(min=1))[:, None, None]  # of all that count now
        queries = queries.float().masked_fill(ignored, 0.0)
        mean = queries.sum(2) / n_block.clamp(min=1)[:, None, None]
        centred = (queries - mean[:, :, None]).masked_fill(ignored, 0.0)
        step = mean - self._mean
        between = step[..., :, None] * step[..., None, :] * (n_before[:, None, None] * share)[..., None]
        self._squares = self._squares + centred.transpose(2, 3) @ centred + between
        self._mean = self._mean + step * share
        self._n_real = self._n_real + real.sum(1)

    def _n_counted(self) -> Tensor:
        """int64 [B]."""
        if self._n_real is None:
            raise RuntimeError("no queries were added")
        return (self._n_real - self.skip).clamp(min=0)

    @property
    def mean(self) -> Tensor:
        """float32 [B, H, D]; zeros for a row in which no query counted yet."""
        if self._mean is None:
            raise RuntimeError("no queries were added")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """float32 [B, H, D, D]; zeros for a row in which no query counted yet."""
        if self._squares is None:
            raise RuntimeError("no queries were added")
        return self._squares / self._n_counted().clamp(min=1)[:, None, None, None]

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        """Apply `select` to the batch dimension of all that is held (beams are reordered, repeated, dropped)."""
        if self._n_real is not None and self._mean is not None and self._squares is not None:
            self._n_real, self._mean, self._squares = map(select, (self._n_real, self._mean, self._squares))
