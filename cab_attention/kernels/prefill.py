"""Triton: exact attention with its log-sum-exp, and the column sums of its softmax weights.

Two passes. The forward gives output and log-sum-exp of each row; the second pass recomputes
`exp(q.k * scale - lse)` tile by tile and sums over queries. Each block of keys is owned by one program, so there are no
atomics and two runs give the same bits. Nothing is N x N, and lengths are run-time arguments: a new length compiles
nothing.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
# Never specialised: every prompt has its own.
RUN_TIME = ["n_queries", "n_keys", "first_row", "window", "stride_mb", "stride_mh", "stride_pb", "stride_ph"]


@triton.jit
def _logits(
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
def _about_keys(
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
def _row_positions(
    positions_ptr, rows, n_queries, n_keys, stride_positions, HAS_POSITIONS: tl.constexpr
):  # fmt: skip
    """The last query stands where the last key stands, the others just before it."""
    last = n_keys - 1
    if HAS_POSITIONS:
        last = tl.load(positions_ptr + last.to(tl.int64) * stride_positions)
    return (last - (n_queries - 1 - rows)).to(tl.int64)


@triton.jit(do_not_specialize=RUN_TIME)
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, mask_ptr, positions_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_mb, stride_mh, stride_mn, stride_pb, stride_ph, stride_pn,
    n_queries, n_keys, first_row, window, scale, softcap,
    N_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Q queries of a head. Writes output [B, H, Q, D] and base-2 lse [B, H, Q], both contiguous."""
    block, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // N_HEADS, batch_head % N_HEADS
    kv_head = head // GROUP
    rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    dims = tl.arange(0, DIM_PADDED)
    row_inside, dim_inside = rows < n_queries, dims < DIM
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    mask_ptr += batch * stride_mb + kv_head * stride_mh
    positions_ptr += batch * stride_pb + kv_head * stride_ph
    shift = n_keys - n_queries  # the last query sees all keys

    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * stride_qn + dims[None, :] * stride_qd,
        mask=row_inside[:, None] & dim_inside[None, :], other=0.0,
    )  # fmt: skip
    row_positions = _row_positions(positions_ptr, rows, n_queries, n_keys, stride_pn, HAS_POSITIONS)

    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DIM_PADDED], tl.float32)
    start, stop = 0, n_keys
    if IS_CAUSAL:
        stop = tl.minimum(n_keys, block * BLOCK_Q + BLOCK_Q + shift)
        if HAS_WINDOW and not HAS_POSITIONS:
            start = tl.maximum(0, block * BLOCK_Q + shift - window + 1) // BLOCK_K * BLOCK_K
    for at in range(start, stop, BLOCK_K):
        keys = at + tl.arange(0, BLOCK_K)
        key_inside = keys < n_keys
        k = tl.load(
            k_ptr + keys.to(tl.int64)[None, :] * stride_kn + dims[:, None] * stride_kd,
            mask=key_inside[None, :] & dim_inside[:, None], other=0.0,
        )  # fmt: skip
        mask, positions = _about_keys(
            mask_ptr, positions_ptr, keys, n_keys, stride_mn, stride_pn, HAS_MASK, HAS_POSITIONS
        )
        s = _logits(
            tl.dot(q, k, input_precision=PRECISION), rows[:, None], keys[None, :], row_positions[:, None],
            positions[None, :], shift, window, scale, softcap, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASKED=True,
        )  # fmt: skip
        s = tl.where(mask[None, :], s, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1))
        finite_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(s - finite_peak[:, None])
        decay = tl.exp2(peak - finite_peak)
        total = total * decay + tl.sum(p, 1)
        v = tl.load(
            v_ptr + keys.to(tl.int64)[:, None] * stride_vn + dims[None, :] * stride_vd,
            mask=key_inside[:, None] & dim_inside[None, :], other=0.0,
        )  # fmt: skip
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        peak = new_peak
    seen = total > 0.0
    divisor = tl.where(seen, total, 1.0)
    acc = acc / divisor[:, None]
    lse = tl.where(seen, peak + tl.log2(divisor), float("inf"))  # weights of a row that sees nothing come out 0
    offset = batch_head * n_queries + rows
    tl.store(lse_ptr + offset, lse, mask=row_inside)
    tl.store(
        out_ptr + offset[:, None] * DIM + dims[None, :], acc.to(out_ptr.dtype.element_ty),
        mask=row_inside[:, None] & dim_inside[None, :],
    )  # fmt: skip


@triton.jit
def _add_weights(
    acc, k, q_ptr, lse_ptr, positions_ptr, keys, positions, start, stop, stride_qn, stride_qd, stride_pn,
    n_queries, n_keys, window, scale, softcap, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Add the weights of queries [start, stop) to acc [BLOCK_K, BLOCK_Q]; it is summed over queries only at the end."""
    dims = tl.arange(0, DIM_PADDED)
    for at in range(start, stop, BLOCK_Q):
        rows = at + tl.arange(0, BLOCK_Q)
        row_inside = rows < n_queries
        q = tl.load(
            q_ptr + rows.to(tl.int64)[None, :] * stride_qn + dims[:, None] * stride_qd,
            mask=row_inside[None, :] & (dims < DIM)[:, None], other=0.0,
        )  # fmt: skip
        lse = tl.load(lse_ptr + rows, mask=row_inside, other=float("inf"))
        row_positions = rows
        if HAS_WINDOW:
            row_positions = _row_positions(positions_ptr, rows, n_queries, n_keys, stride_pn, HAS_POSITIONS)
        s = _logits(
            tl.dot(k, q, input_precision=PRECISION), rows[None, :], keys[:, None], row_positions[None, :],
            positions[:, None], n_keys - n_queries, window, scale, softcap, IS_CAUSAL, HAS_WINDOW, HAS_SOFTCAP, MASKED,
        )  # fmt: skip
        acc += tl.exp2(s - lse[None, :])
    return acc


@triton.jit(do_not_specialize=RUN_TIME)
def _column_sums(
    q_ptr, k_ptr, lse_ptr, scores_ptr, mask_ptr, positions_ptr,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_mb, stride_mh, stride_mn, stride_pb, stride_ph, stride_pn,
    n_queries, n_keys, first_row, window, scale, softcap,
    N_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_POSITIONS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_K keys under one query head. Writes their scores [B, H, K], from query `first_row` on.

    Keys do not influence each other here, so the key mask is applied once, to the sums; only tiles on the causal
    diagonal, and all with a window, are masked inside.
    """
    block, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, head = batch_head // N_HEADS, batch_head % N_HEADS
    kv_head = head // GROUP
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, DIM_PADDED)
    key_inside = keys < n_keys
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    mask_ptr += batch * stride_mb + kv_head * stride_mh
    positions_ptr += batch * stride_pb + kv_head * stride_ph
    lse_ptr += batch_head * n_queries

    k = tl.load(
        k_ptr + keys.to(tl.int64)[:, None] * stride_kn + dims[None, :] * stride_kd,
        mask=key_inside[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    mask, positions = _about_keys(mask_ptr, positions_ptr, keys, n_keys, stride_mn, stride_pn, HAS_MASK, HAS_POSITIONS)
    start, stop = first_row, n_queries
    free = start  # first row from which every row sees every key of the block
    if IS_CAUSAL:
        start = tl.maximum(start, block * BLOCK_K - (n_keys - n_queries))
        above = tl.maximum(0, block * BLOCK_K + BLOCK_K - 1 - (n_keys - n_queries) - start)
        free = start + (above + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q
        if HAS_WINDOW:
            free = stop
            if not HAS_POSITIONS:
                stop = tl.minimum(stop, block * BLOCK_K + BLOCK_K - (n_keys - n_queries) + window)
    acc = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    if IS_CAUSAL:
        acc = _add_weights(
            acc, k, q_ptr, lse_ptr, positions_ptr, keys, positions, start, tl.minimum(free, stop), stride_qn,
            stride_qd, stride_pn, n_queries, n_keys, window, scale, softcap, DIM, DIM_PADDED, IS_CAUSAL, HAS_WINDOW,
            HAS_SOFTCAP, HAS_POSITIONS, PRECISION, True, BLOCK_Q,
        )  # fmt: skip
    if not HAS_WINDOW:
        acc = _add_weights(
            acc, k, q_ptr, lse_ptr, positions_ptr, keys, positions, free, stop, stride_qn,
            stride_qd, stride_pn, n_queries, n_keys, window, scale, softcap, DIM, DIM_PADDED, IS_CAUSAL, HAS_WINDOW,
            HAS_SOFTCAP, HAS_POSITIONS, PRECISION, False, BLOCK_Q,
        )  # fmt: skip
    sums = tl.where(mask, tl.sum(acc, 1), 0.0)
    tl.store(scores_ptr + batch_head * n_keys + keys, sums, mask=key_inside)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    key_positions: Tensor | None,
    sliding_window: int | None,
    softcap: float | None,
    score_queries: int,
) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D]; k, v [B, G, K, D], any strides -> output [B, H, Q, D] in q's dtype, scores [B, H, K] float32."""
    (n_batch, n_heads, n_q, dim), n_kv_heads, n_k = q.shape, k.shape[1], k.shape[2]
    if 0 in (n_batch, n_heads, n_q, n_k):
        return torch.zeros_like(q), torch.zeros(n_batch, n_heads, n_k, dtype=torch.float32, device=q.device)
    mask = q if key_mask is None else _per_kv_head(key_mask).view(torch.uint8)
    positions = q if key_positions is None else key_positions
    constants = dict(
        N_HEADS=n_heads,
        GROUP=n_heads // n_kv_heads,
        DIM=dim,
        DIM_PADDED=max(16, triton.next_power_of_2(dim)),
        IS_CAUSAL=is_causal,
        HAS_WINDOW=sliding_window is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_MASK=key_mask is not None,
        HAS_POSITIONS=key_positions is not None,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",  # "tf32" says nothing of half precision
    )
    of_keys = (*_strides(mask, key_mask), *_strides(positions, key_positions))
    sizes = (n_q, n_k, n_q - score_queries, sliding_window or 0, scale, softcap or 1.0)
    heads = n_batch * n_heads
    plain = key_mask is None and sliding_window is None and softcap is None and (not is_causal or n_q == n_k)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if plain and q.is_cuda and q.dtype != torch.float32 and dim <= 128 and dim % 8 == 0:
            output, lse = _cudnn_forward(q, k, v, scale, is_causal)
        else:
            output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
            lse = torch.empty(n_batch, n_heads, n_q, dtype=torch.float32, device=q.device)
            tile = _tile(q.dtype, dim, "forward")
            _forward[(triton.cdiv(n_q, tile["BLOCK_Q"]), heads)](
                q, k, v, output, lse, mask, positions, *q.stride(), *k.stride(), *v.stride(), *of_keys, *sizes,
                **constants, **tile,
            )  # fmt: skip
        scores = torch.zeros(n_batch, n_heads, n_k, dtype=torch.float32, device=q.device)
        if score_queries > 0:
            tile = _tile(q.dtype, dim, "columns")
            _column_sums[(triton.cdiv(n_k, tile["BLOCK_K"]), heads)](
                q, k, lse, scores, mask, positions, *q.stride(), *k.stride(), *of_keys, *sizes, **constants, **tile
            )
    return output, scores


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Output and base-2 log-sum-exp of plain attention from cuDNN, which takes grouped KV heads as they are."""
    output, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, is_causal, False, scale=scale
    )[:2]
    return output, lse.view(q.shape[:3]).mul_(LOG2_E)


def _tile(dtype: torch.dtype, dim: int, kernel: str) -> dict[str, int]:
    """Tile sizes; those for head dim 128 and half precision were chosen by measurement on an H200."""
    if dtype == torch.float32 or dim > 128:
        return dict(BLOCK_Q=32, BLOCK_K=32, num_warps=4, num_stages=1 if dim > 128 else 2)
    if kernel == "forward":
        return dict(BLOCK_Q=128, BLOCK_K=32, num_warps=4, num_stages=3)
    return dict(BLOCK_Q=64, BLOCK_K=128, num_warps=4, num_stages=3)


def _per_kv_head(key_mask: Tensor) -> Tensor:
    return key_mask[:, None] if key_mask.ndim == 2 else key_mask


def _strides(tensor: Tensor, given: Tensor | None) -> tuple[int, int, int]:
    """Strides over batch, KV head and key; a mask without heads is read again for each."""
    if given is None:
        return 0, 0, 0
    batch, head, key = tensor.stride()
    return batch, head if tensor.shape[1] > 1 else 0, key
