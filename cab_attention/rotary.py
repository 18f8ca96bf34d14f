"""A layer's rotary position embedding, by its model's own code: keys and queries turned to other positions."""

import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor, nn

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies are the same at every length, so that rotations add up."""


class Rotary:
    """Rotates what an attention module's RoPE rotated, further or back.

    R(p) is the rotation that the module's model file gives position p, without the factor by which some RoPE types
    (yarn) also scale cos and sin. R(p) R(q) = R(p + q), and R(-p) undoes R(p).

    Args:
        module: an attention module of a transformers model, with `config` and `layer_idx`.

    Raises:
        ValueError: the model does not rotate by one `apply_rotary_pos_emb(q, k, cos, sin)` and one rotary embedding
            class in every layer, or the RoPE type's frequencies depend on the length.
    """

    def __init__(self, module: nn.Module) -> None:
        name, file = type(module).__name__, sys.modules[type(module).__module__]
        rotate: Any = getattr(file, "apply_rotary_pos_emb", None)
        embeddings = [of for key, of in vars(file).items() if key.endswith("RotaryEmbedding") and isinstance(of, type)]
        if rotate is None or list(inspect.signature(rotate).parameters)[:4] != ["q", "k", "cos", "sin"]:
            raise ValueError(f"{name}: rotating keys needs apply_rotary_pos_emb(q, k, cos, sin) in its model file")
        if len(embeddings) != 1:
            raise ValueError(f"{name}: its model file has {len(embeddings)} rotary embedding classes, allowed is one")
        # Some models rotate in some layers only (SmolLM3, Cohere 2), which nothing but the code of `forward` tells.
        if not re.search(r"^ {8}\w.* = apply_rotary_pos_emb\(", inspect.getsource(type(module).forward), re.MULTILINE):
            raise ValueError(f"{name}: rotating keys is allowed where every layer rotates them, this model's may not")
        config: Any = module.config
        self._apply_to_queries_and_keys = rotate
        self._embedding: Any = embeddings[0](config).to(next(module.parameters()).device)
        self._options: dict[str, str] = {}
        rope_type, scaling = self._embedding.rope_type, "attention_scaling"
        if isinstance(rope_type, dict):  # by the kind of layer (Gemma 3)
            layer_type: str = config.layer_types[module.layer_idx]
            rope_type, scaling = rope_type.get(layer_type), f"{layer_type}_{scaling}"
            self._options = {"layer_type": layer_type}
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"{name}: rope_type={rope_type!r}, rotating keys is allowed with {', '.join(ROPE_TYPES)}")
        self._scaling: float = getattr(self._embedding, scaling)

    def rotate(self, x: Tensor, by: Tensor) -> Tensor:
        """R(by) x.

        Args:
            x: [B, G, K, D].
            by: positions to rotate by, of any sign; broadcastable to [B, G, K].

        Returns:
            [B, G, K, D] in the dtype of `x`, computed in float32 and rounded once.
        """
        # The model's functions know one position for all heads of a row: here every head is a row of its own.
        flat = x.float().reshape(-1, 1, *x.shape[2:])
        cos, sin = self._cos_sin(by.expand(x.shape[:3]).reshape(-1, x.shape[2]))
        return self._apply(flat, cos, sin).reshape(x.shape).to(x.dtype)

    def rotate_moments(self, mean: Tensor, covariance: Tensor, start: int | Tensor, n: int) -> tuple[Tensor, Tensor]:
        """The mean m and covariance S of vectors under the average rotation over n positions.

        With A = (R(start) + ... + R(start + n - 1)) / n these are A m and A S A^T (Devoto et al. 2025,
        arXiv 2510.00636, section 2.2: expected attention's future queries).

        Args:
            mean: [B, H, D].
            covariance: [B, H, D, D].
            start: the first position, one for all rows or int64 [B].
            n: how many positions.

        Returns:
            float32 [B, H, D] and [B, H, D, D].
        """
        starts = torch.as_tensor(start, device=mean.device).expand(len(mean))
        cos, sin = self._cos_sin(starts[:, None] + torch.arange(n, device=mean.device))
        # The rotation is linear in (cos, sin), so their averages give the average rotation.
        average = cos.mean(1, keepdim=True), sin.mean(1, keepdim=True)
        future_mean = self._apply(mean.float()[:, :, None], *average)[:, :, 0]
        rows = self._apply(covariance.float(), *average)  # S A^T
        return future_mean, self._apply(rows.transpose(2, 3), *average).transpose(2, 3)

    def _cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [N, K, rotated dims] of positions [N, K], for a rotation that keeps lengths."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self._embedding(like, positions, **self._options)
        return cos / self._scaling, sin / self._scaling

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [N, H, K, D] rotated by cos and sin [N, K, rotated dims]."""
        rotated, _ = self._apply_to_queries_and_keys(x, x[:, :0], cos, sin)
        return rotated
