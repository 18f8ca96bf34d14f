"""Prefill on a GPU in two passes: an exact forward with its log-sum-exp, then the column sums of the weights."""

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
    score_step: int = 1,
    forward: str = "triton",
    scores: str = "triton",
) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D]; k, v [B, G, K, D], any strides, nothing empty -> output [B, H, Q, D] in q's dtype, scores
    [B, H, K] float32.

    Of the last `score_queries` rows every `score_step`-th counts in the scores, from the last row back.
    `forward` ("triton" or "cudnn") and `scores` ("triton", "hopper" or "none") are as in `dispatch.Choice`.
    """
    options: dict[str, Any] = dict(
        is_causal=is_causal,
        key_mask=key_mask,
        key_positions=key_positions,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    counted: dict[str, Any] = dict(score_queries=score_queries, score_step=score_step)
    if forward == "cudnn":
        output, lse = cudnn_forward(q, k, v, scale, is_causal)
    else:
        output, lse = triton_forward(q, k, v, scale, **options)
    if scores == "none":
        return output, torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.float32, device=q.device)
    if scores == "hopper":
        from cab_attention.kernels.hopper_column_sums import hopper_column_sums

        return output, hopper_column_sums(q, k, lse, scale, is_causal=is_causal, key_mask=key_mask, **counted)
    return output, column_sums(q, k, lse, scale, **options, **counted)
