"""The attention and mask functions that transformers calls under the names `cab` and `eager_with_scores`."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from cab_attention.cache_layer import IMPLEMENTATIONS, EvictingLayer, Operator
from cab_attention.kernels.flash_attention_accumulate import (
    FlashAttentionWithAccumulation,
    flash_attention_with_cumulative_scores,
)
from cab_attention.kernels.visibility import visible_keys
from cab_attention.shared_prefill import SharedLayer


def register() -> None:
    """Make `attn_implementation="cab"` and `"eager_with_scores"` known to transformers."""
    for name, function in zip(IMPLEMENTATIONS, (cab_attention_forward, eager_with_scores_forward), strict=True):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: PreTrainedConfig | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The 2D padding mask [B, keys present], or None: causality and windows are the operator's, no N x N mask is built.

    A static cache's unwritten slots lie behind the mask's last column.
    """
    # transformers forbids the causal shortcut in a prefill when the pattern is more than causal (packed sequences).
    if use_vmap or (q_length > 1 and not allow_is_causal_skip) or getattr(config, "attention_chunk_size", None):
        raise ValueError(
            "cab attention knows causal and sliding-window masks with padding, not packed sequences (give an "
            "attention_mask with position_ids), chunks or custom patterns: use attn_implementation='sdpa' for those"
        )
    start, present = int(kv_offset), int(q_offset) + q_length - int(kv_offset)
    if attention_mask is None:
        return torch.ones(batch_size, present, dtype=torch.bool, device=device) if present < kv_length else None
    # Reading a mask's values waits for the GPU: done in a prefill, once a forward, never in a decode step.
    if q_length > 1 and present == kv_length and bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] == present:  # `generate` with a static cache hands in a mask that it cut here before
        return attention_mask
    return attention_mask[:, start : start + present]


def _attention(
    operator: Operator,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    score_recorder: FlashAttentionWithAccumulation | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, D]; key, value [B, G, K, D] -> ([B, Q, H, D], None)."""
    if dropout:
        raise ValueError(f"cab attention is for inference: dropout={dropout}, call model.eval()")
    if s_aux is not None:
        raise ValueError("cab attention does not know attention sinks that are parameters of the model (s_aux)")
    if output_attentions:
        raise ValueError("cab attention never holds the attention weights: no output_attentions")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            f"cab attention takes the 2D padding mask, got one of shape {list(attention_mask.shape)}: pass a 2D "
            "attention_mask, and set the implementation on the whole model (model.set_attn_implementation('cab'))"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and not getattr(module, "is_cross_attention", False)
    options = dict(scale=scaling, is_causal=is_causal, sliding_window=sliding_window, softcap=softcap)

    layer: EvictingLayer | SharedLayer | None = getattr(key, "evicting_layer", None)
    if layer is not None:
        if score_recorder is not None:
            raise ValueError("EvictingCache gathers scores itself (cache.layers[i].scores): use one of the two")
        output = layer.attend(module, operator, query, attention_mask, **options)
    else:
        _refuse_window_left_to_the_mask(module, sliding_window)
        if attention_mask is not None and attention_mask.shape[1] < key.shape[2]:
            key, value = key[:, :, : attention_mask.shape[1]], value[:, :, : attention_mask.shape[1]]
        rows = None if score_recorder is not None else 0
        output, scores = operator(query, key, value, key_mask=attention_mask, score_queries=rows, **options)
        if score_recorder is not None:
            score_recorder.add_scores(scores, n_queries=query.shape[2])
    return output.transpose(1, 2).contiguous(), None


def _refuse_window_left_to_the_mask(module: nn.Module, sliding_window: int | None) -> None:
    """Some models (PhiMoE) put their sliding window into the N x N mask alone, which is not built here."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    slides = window is not None and (types is None or layer is None or types[layer] == "sliding_attention")
    if slides and sliding_window is None:
        raise ValueError(
            f"{type(module).__name__} does not hand its sliding window to the attention function: "
            "use attn_implementation='sdpa' for this model"
        )


def cab_attention_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`cab`: exact attention and cumulative scores without the N x N matrix."""
    return _attention(flash_attention_with_cumulative_scores, module, *args, **kwargs)


def eager_with_scores_forward(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """`eager_with_scores`: the model's own eager attention, its N x N weights summed over queries and dropped."""
    return _attention(partial(_eager_operator, module), module, *args, **kwargs)


def _eager_operator(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cumulative_scores: Tensor | None = None,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    score_queries: int | None = None,
    score_step: int = 1,
    per_kv_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """The operator's contract on top of the `eager_attention_forward` of the model's own file."""
    n_q, n_k, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    visible = visible_keys(
        range(n_q),
        range(n_k),
        n_q,
        n_k,
        q.device,
        is_causal=is_causal,
        key_mask=key_mask,
        key_positions=key_positions,
        sliding_window=sliding_window,
    )
    mask = None
    if visible is not None:
        visible = visible.expand(-1, k.shape[1], n_q, -1).repeat_interleave(group, 1)
        mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(
            ~visible, torch.finfo(q.dtype).min
        )
    output, weights = _own_eager_attention(module)(module, q, k, v, mask, scaling=scale, dropout=0.0, softcap=softcap)
    rows = n_q if score_queries is None else min(n_q, score_queries)
    counted = slice(n_q - rows + (rows - 1) % score_step, None, score_step)
    output, weights = output.transpose(1, 2), weights[:, :, counted]
    if visible is not None:
        # Eager gives a row that sees nothing uniform weights over everything.
        output = output.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        weights = weights.masked_fill(~visible[:, :, counted], 0.0)
    scores = weights.sum(2, dtype=torch.float32)
    if per_kv_head:
        scores = scores.unflatten(1, (k.shape[1], group)).sum(2)
    if cumulative_scores is not None:
        scores[:, :, : cumulative_scores.shape[2]] += cumulative_scores
    return output, scores


def _own_eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise ValueError(f"{type(module).__name__}: its model file has no eager_attention_forward")
    return function
