"""Prompts without a repeated token: in a first layer with RoPE equal tokens have keys of one norm, up to rounding."""

import torch

from tests.feeding import left_padded
from tests.tiny_models import VOCABULARY


def left_padded_distinct(*padding: int, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, n_tokens], a row for each number of padding tokens."""
    ids, mask = left_padded(*padding, n_tokens=n_tokens)
    generator = torch.Generator().manual_seed(0)
    distinct = torch.stack([3 + torch.randperm(VOCABULARY - 3, generator=generator)[:n_tokens] for _ in padding])
    return torch.where(mask == 1, distinct, ids), mask
