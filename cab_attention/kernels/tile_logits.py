"""Triton: what every kernel shares: the logits of a tile, and which keys its rows see."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Never specialised: every prompt has its own.
RUN_TIME = ["n_queries", "n_keys", "first_row", "window", "stride_mb", "stride_mh", "stride_pb", "stride_ph"]


@triton.jit
def tile_logits(
    s, rows, keys, row_positions, key_positions, shift, window, scale, softcap,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile from its dot products; with MASKED, -inf where a row does not see a key.

    Rows and keys come broadcast to the tile, which may lie either way.
    """
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): goes to +-1 without NaN
        s = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (s * scale) / softcap) + 1.0))
        s = s * 1.4426950408889634
    else:
        s = s * (scale * 1.4426950408889634)
    if MASKED and IS_CAUSAL:
        s = tl.where(keys <= rows + shift, s, float("-inf"))
    if MASKED and HAS_WINDOW:
        s = tl.where(row_positions - key_positions < window, s, float("-inf"))
    return s


@triton.jit
def about_keys(
    mask_ptr, positions_ptr, keys, n_keys, stride_mask, stride_positions,
    HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Which of these keys any row may see, and where they stand."""
    inside = keys < n_keys
    mask = inside
    if HAS_MASK:
        mask = tl.load(mask_ptr + keys.to(tl.int64) * stride_mask, mask=inside, other=0) != 0
    positions = keys.to(tl.int64)
    if HAS_POSITIONS:
        positions = tl.load(positions_ptr + keys.to(tl.int64) * stride_positions, mask=inside, other=0)
    return mask, positions


@triton.jit
def positions_of_rows(
    positions_ptr, rows, n_queries, n_keys, stride_positions, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """The last query stands where the last key stands, the others just before it."""
    last = n_keys - 1
    if HAS_POSITIONS:
        last = tl.load(positions_ptr + last.to(tl.int64) * stride_positions)
    return (last - (n_queries - 1 - rows)).to(tl.int64)


@triton.jit
def load_rows(
    ptr, at, n, stride_row, stride_dim, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows [at, at + BLOCK) of a matrix [n, DIM], padded with zeros to DIM_PADDED; TRANSPOSED: [DIM_PADDED, BLOCK].

    With MASKED, rows from n on are zero; without, all must lie inside.
    """
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, DIM_PADDED)
    ptr += tl.full((), at, tl.int64) * stride_row
    if TRANSPOSED:
        pointers = ptr + rows[None, :].to(tl.int64) * stride_row + dims[:, None] * stride_dim
        inside, dim_inside = (at + rows < n)[None, :], (dims < DIM)[:, None]
    else:
        pointers = ptr + rows[:, None].to(tl.int64) * stride_row + dims[None, :] * stride_dim
        inside, dim_inside = (at + rows < n)[:, None], (dims < DIM)[None, :]
    if DIM == DIM_PADDED:
        if MASKED:
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers)
    else:
        if MASKED:
            tile = tl.load(pointers, mask=inside & dim_inside, other=0.0)
        else:
            tile = tl.load(pointers, mask=dim_inside, other=0.0)
    return tile


def constants_of(
    q: Tensor,
    k: Tensor,
    is_causal: bool,
    key_mask: Tensor | None,
    key_positions: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """The compile-time arguments that every kernel takes."""
    return dict(
        N_HEADS=q.shape[1],
        GROUP=q.shape[1] // k.shape[1],
        DIM=q.shape[3],
        DIM_PADDED=max(16, triton.next_power_of_2(q.shape[3])),
        IS_CAUSAL=is_causal,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_MASK=key_mask is not None,
        HAS_POSITIONS=key_positions is not None,
        PRECISION="ieee" if q.element_size() == 4 else "tf32",  # "tf32" says nothing of half precision
    )


def key_arguments(
    q: Tensor, key_mask: Tensor | None, key_positions: Tensor | None
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Mask (as bytes) and positions, each with strides over batch, KV head and key; `q` stands in for what is None."""
    mask, mask_strides = q, (0, 0, 0)
    if key_mask is not None:
        batch, *head, key = key_mask.stride()
        mask, mask_strides = key_mask.view(torch.uint8), (batch, head[0] if head else 0, key)
    positions = q if key_positions is None else key_positions
    return mask, positions, (*mask_strides, *((0, 0, 0) if key_positions is None else key_positions.stride()))
