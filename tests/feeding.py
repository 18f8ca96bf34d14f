"""Tokens for tiny models, and feeding them forward by forward."""

import torch
from transformers import Cache, PreTrainedModel

from tests.tiny_models import random_ids, tiny_model


def left_padded(*padding: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, n_tokens], a row for each number of padding tokens."""
    ids, mask = random_ids(len(padding), n_tokens), torch.ones(len(padding), n_tokens, dtype=torch.int64)
    for row, n_pad in enumerate(padding):
        ids[row, :n_pad], mask[row, :n_pad] = 0, 0
    return ids, mask


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: object
) -> torch.Tensor:
    """One forward. `mask` [B, tokens so far], the first real token standing at RoPE position 0. Logits [B, n, V]."""
    if mask is None:
        mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.int64)
    rope = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    options = {"attention_mask": mask, "position_ids": rope} | options
    return model(ids, past_key_values=cache, **options).logits


def tiny_model_with_key_gains(architecture: str, attention: str = "cab", **changes: object) -> PreTrainedModel:
    """Where a model normalises its keys, as made, all are as long up to rounding, and CAB would rank by rounding."""
    model = tiny_model(architecture, attention, **changes)
    for name, parameter in model.named_parameters():
        if "k_norm" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    return model
