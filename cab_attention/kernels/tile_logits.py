"""Triton: what every kernel shares: the logits of a tile, and which keys its rows see."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """To float32's precision, relative, also near 0, where the closed form cancels; +-1 far out, never NaN."""
    square = x * x
    near = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))


@triton.jit
def tile_logits(
    s, rows, keys, row_positions, key_positions, shift, window, scale, softcap,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile from its dot products; with MASKED, -inf where a row does not see a key.

    Rows and keys come broadcast to the tile, which may lie either way.
    """
    if HAS_SOFTCAP:
        s = softcap * _tanh(s * scale / softcap)
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
    TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, READ_ONCE: tl.constexpr = False,
):  # fmt: skip
    """Rows [at, at + BLOCK) of a matrix [n, DIM], padded with zeros to DIM_PADDED; TRANSPOSED: [DIM_PADDED, BLOCK].

    With MASKED, rows from n on are zero; without, all must lie inside. READ_ONCE leaves the L2 cache to other data.
    """
    POLICY: tl.constexpr = "evict_first" if READ_ONCE else ""
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
            tile = tl.load(pointers, mask=inside, other=0.0, eviction_policy=POLICY)
        else:
            tile = tl.load(pointers, eviction_policy=POLICY)
    else:
        if MASKED:
            tile = tl.load(pointers, mask=inside & dim_inside, other=0.0, eviction_policy=POLICY)
        else:
            tile = tl.load(pointers, mask=dim_inside, other=0.0, eviction_policy=POLICY)
    return tile
