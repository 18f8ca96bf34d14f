"""Prefill on a GPU in two passes: an exact forward with its log-sum-exp, then the column sums of the weights."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from cab_attention.kernels.column_sums import column_sums
from cab_attention.kernels.forward import cudnn_forward, triton_forward


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
    no_scores = torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.float32, device=q.device)
    if 0 in (*q.shape[:3], k.shape[2]):
        return torch.zeros_like(q), no_scores
    options: dict[str, Any] = dict(
        is_causal=is_causal,
        key_mask=key_mask,
        key_positions=key_positions,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    plain = key_mask is None and sliding_window is None and softcap is None
    plain = plain and (not is_causal or q.shape[2] == k.shape[2])
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        if plain and q.is_cuda and q.dtype != torch.float32 and q.shape[3] <= 128 and q.shape[3] % 8 == 0:
            output, lse = cudnn_forward(q, k, v, scale, is_causal)
        else:
            output, lse = triton_forward(q, k, v, scale, **options)
        if score_queries == 0:
            return output, no_scores
        return output, column_sums(q, k, lse, scale, **options, score_queries=score_queries)
