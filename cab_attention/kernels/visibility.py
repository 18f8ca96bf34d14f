"""Which keys a block of query rows may see: the one place that builds a boolean mask, never for all rows at once
unless asked to."""

import torch
from torch import Tensor


def visible_keys(
    rows: range,
    keys: range,
    n_queries: int,
    n_keys: int,
    device: torch.device,
    *,
    is_causal: bool,
    key_mask: Tensor | None,
    key_positions: Tensor | None,
    sliding_window: int | None,
) -> Tensor | None:
    """Bool mask [B or 1, G or 1, rows, keys], True = visible; None when every row sees every key.

    Rows and keys are aligned bottom-right: the last query is the last key. With `key_positions` [B, G, K] the window
    compares positions, the last query standing at the position of the last key; else it compares indices.
    """
    visible = None
    row_end = torch.arange(rows.start, rows.stop, device=device)[:, None] + (n_keys - n_queries)  # its last key
    key_index = torch.arange(keys.start, keys.stop, device=device)[None, :]
    if is_causal and keys.stop > rows.start + n_keys - n_queries + 1:
        visible = (key_index <= row_end)[None, None]
    if sliding_window is not None:
        if key_positions is None:
            near = (row_end - key_index < sliding_window)[None, None]
        else:
            from_last = torch.arange(rows.start, rows.stop, device=device) - (n_queries - 1)
            row_position = key_positions[:, :, -1:] + from_last
            near = row_position[..., :, None] - key_positions[:, :, None, keys.start : keys.stop] < sliding_window
        visible = near if visible is None else visible & near
    if key_mask is not None:
        mask = (key_mask[:, None] if key_mask.ndim == 2 else key_mask)[:, :, None, keys.start : keys.stop]
        visible = mask if visible is None else visible & mask
    return visible
