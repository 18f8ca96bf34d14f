"""Prefill on a GPU in two passes: an exact forward with its log-sum-exp, then the column sums of the weights."""

from collections.abc import Sequence
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
    requests = [(score_queries, score_step)]
    output, [sums] = prefill_with_several_scores(q, k, v, scale, options, requests, forward=forward, scores=scores)
    return output, sums


def prefill_with_several_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    options: dict[str, Any],
    requests: Sequence[tuple[int, int]],
    *,
    forward: str,
    scores: str,
) -> tuple[Tensor, list[Tensor]]:
    """The same with scores for each of the (score_queries, score_step): one forward, then a second pass for each.

    `options`: `is_causal`, `key_mask`, `key_positions`, `sliding_window` and `softcap`.
    """
    if forward == "cudnn":
        output, lse = cudnn_forward(q, k, v, scale, options["is_causal"])
    else:
        output, lse = triton_forward(q, k, v, scale, **options)

    def sums(score_queries: int, score_step: int) -> Tensor:
        counted: dict[str, Any] = dict(score_queries=score_queries, score_step=score_step)
        if scores == "none" or score_queries == 0:
            return torch.zeros(*q.shape[:2], k.shape[2], dtype=torch.float32, device=q.device)
        if scores == "hopper":
            from cab_attention.kernels.hopper_column_sums import hopper_column_sums

            plain = {name: options[name] for name in ("is_causal", "key_mask")}
            return hopper_column_sums(q, k, lse, scale, **plain, **counted)
        return column_sums(q, k, lse, scale, **options, **counted)

    return output, [sums(*request) for request in requests]
