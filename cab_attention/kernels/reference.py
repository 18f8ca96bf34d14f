"""The definition of (output, scores) in plain torch: the N x N matrix, for tests on small inputs only."""

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    key_positions: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    score_queries: int | None = None,
    score_step: int = 1,
) -> tuple[Tensor, Tensor]:
    """q [B, H, Q, D]; k, v [B, G, K, D] -> output [B, H, Q, D], scores [B, H, K], in fp32 (fp64 for fp64 input)."""
    (_, n_heads, n_q, dim), (_, n_kv_heads, n_k, _) = q.shape, k.shape
    group, dtype = n_heads // n_kv_heads, torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype).repeat_interleave(group, 1), v.to(dtype).repeat_interleave(group, 1)
    logits = q @ k.mT * (dim**-0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    visible = torch.ones_like(logits, dtype=torch.bool)
    if is_causal:
        visible = visible.tril(n_k - n_q)
    if sliding_window is not None and n_k > 0:
        key_at = torch.arange(n_k, device=q.device).expand(q.shape[0], n_heads, n_k)
        if key_positions is not None:
            key_at = key_positions.repeat_interleave(group, 1)
        query_at = key_at[..., -1:] - torch.arange(n_q - 1, -1, -1, device=q.device)
        visible &= query_at[..., :, None] - key_at[..., None, :] < sliding_window
    if key_mask is not None:
        visible &= (key_mask[:, None] if key_mask.ndim == 2 else key_mask.repeat_interleave(group, 1))[:, :, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0.0)
    before_last = torch.arange(n_q - 1, -1, -1, device=q.device)
    counted = (before_last < (n_q if score_queries is None else score_queries)) & (before_last % score_step == 0)
    return weights @ v, weights[:, :, counted].sum(2)
