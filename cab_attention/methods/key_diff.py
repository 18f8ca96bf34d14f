from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cab_attention.methods.base import CachedKeys, Granularity, Method

BLOCK = 4096  # keys held in float32 at a time


@dataclass(frozen=True)
class KeyDiff(Method):
    """Keep the keys that are least like the others.

    Park et al. 2025, arXiv 2504.15364: keys rank by the cosine between them and the mean of the cached keys of their
    head, each first divided by its norm; the lowest stay. Keys are taken after RoPE, all in float32. One cut, after the
    prompt; the paper's prompts come in blocks of 128 tokens with a cut after each, which is
    `evict_in_prefill="chunk"`.
    """

    name: ClassVar = "key_diff"
    observes: ClassVar = "nothing"
    evicts_in_decode: ClassVar = False
    granularities: ClassVar[tuple[Granularity, ...]] = ("head", "layer", "model")

    def scores(self, cached: CachedKeys) -> Tensor:
        return cached.once("scores", lambda: _unlikeness(cached))

    def priorities(self, cached: CachedKeys) -> Tensor:
        return cached.observed()


def _unlikeness(cached: CachedKeys) -> Tensor:
    """float32 [B, G, K], minus the cosine between each key and the mean of the unit keys."""
    blocks = cached.keys.split(BLOCK, dim=2)
    anchor = torch.zeros_like(cached.keys[:, :, :1], dtype=torch.float32)  # the mean, times a number
    for keys, present in zip(blocks, cached.valid[..., None].split(BLOCK, dim=2), strict=True):
        anchor += F.normalize(keys.float(), dim=-1).masked_fill(~present, 0.0).sum(2, keepdim=True)
    return torch.cat([F.cosine_similarity(keys.float(), anchor, dim=-1) for keys in blocks], dim=2).neg()
