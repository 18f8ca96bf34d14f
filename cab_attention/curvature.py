"""A graph over blocks of keys, and how much of a bridge each block is. For the CAB method.

Everything is over blocks x blocks; nothing is ever built over tokens x tokens.
"""

import math

import torch
from torch import Tensor

NEIGHBOURS = 4  # edges from each block to the blocks it attends to most
FEWEST_BLOCKS = 6  # below this a graph of 4 neighbours says nothing


def block_representatives(keys: Tensor, valid: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """The key of largest L2 norm in each block of consecutive keys (max-L2 coarsening).

    Args:
        keys: [B, G, K, D], empty slots at the front.
        valid: bool [B, G, K].
        block_size: keys a block, counted from the first valid key; the last block may be shorter.

    Returns:
        float32 representatives [B, G, M, D] and bool [B, G, M], which blocks exist. M = ceil(K / block_size).
    """
    n_keys, dim = keys.shape[2:]
    n_blocks = -(-n_keys // block_size)
    empty = n_keys - valid.sum(-1, keepdim=True)
    slot = torch.arange(n_blocks * block_size, device=keys.device) + empty  # [B, G, M * block_size]
    norms = keys.float().norm(dim=-1).gather(-1, slot.clamp(max=n_keys - 1))
    norms = norms.masked_fill(slot >= n_keys, -1.0).unflatten(-1, (n_blocks, block_size))
    first = torch.arange(n_blocks, device=keys.device) * block_size + empty
    chosen = (first + norms.argmax(-1)).clamp(max=n_keys - 1)  # of equal norms the lowest position
    representatives = keys.gather(2, chosen[..., None].expand(-1, -1, -1, dim)).float()
    return representatives, first < n_keys


def block_log_weights(representatives: Tensor, exists: Tensor) -> Tensor:
    """Log of the symmetric attention between blocks, W = (P + P^T) / 2 with P = softmax(R R^T / sqrt(D)).

    A block never attends to itself. The log keeps the order of weights that float32 would round to 0 (long keys).
    representatives float32 [B, G, M, D], exists bool [B, G, M] -> [B, G, M, M], -inf off pairs of two existing blocks.
    """
    n_blocks, dim = representatives.shape[2:]
    logits = representatives @ representatives.mT * dim**-0.5
    itself = torch.eye(n_blocks, dtype=torch.bool, device=logits.device)
    pair = exists[..., :, None] & exists[..., None, :] & ~itself
    log_attention = logits.masked_fill(~pair, -torch.inf).log_softmax(-1).masked_fill(~pair, -torch.inf)
    return torch.logaddexp(log_attention, log_attention.mT) - math.log(2)


def neighbour_graph(log_weights: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Adjacency, float 0/1 [B, G, M, M]: each block's strongest neighbours, made symmetric."""
    n_blocks = log_weights.shape[-1]
    # Not topk: of equal weights it takes any.
    strongest = log_weights.sort(dim=-1, descending=True, stable=True).indices[..., : min(neighbours, n_blocks)]
    edges = torch.zeros_like(log_weights).scatter_(-1, strongest, 1.0) * (log_weights > -torch.inf)
    return torch.maximum(edges, edges.mT)


def forman_curvature(adjacency: Tensor) -> Tensor:
    """Augmented Forman-Ricci curvature of each edge: 4 - deg(a) - deg(c) + 3 x (triangles through it), 0 off edges.

    The unweighted form with triangles as faces: Samal et al. 2018, Scientific Reports 8, 8650.
    """
    degree = adjacency.sum(-1)
    triangles = adjacency @ adjacency
    return (4 - degree[..., :, None] - degree[..., None, :] + 3 * triangles) * adjacency


def block_values(edge_values: Tensor, weights: Tensor, adjacency: Tensor) -> Tensor:
    """A block's value [B, G, M]: the mean of its edges' values, weighted by W."""
    edge_weights = weights * adjacency
    total = (edge_weights * edge_values).sum(-1)
    return total / edge_weights.sum(-1).clamp(min=torch.finfo(weights.dtype).tiny)


def bridge_order_by_curvature(log_weights: Tensor) -> Tensor:
    """Blocks' bridge rank value [B, G, M], lowest = strongest bridge: mean Forman-Ricci curvature.

    An edge between two communities closes no triangles, so its curvature is low.
    """
    adjacency = neighbour_graph(log_weights)
    # Curvatures are small integers: blocks whose edges share one must tie, whatever the rounding of the weights.
    return block_values(forman_curvature(adjacency), log_weights.exp(), adjacency).round(decimals=4)


def bridge_order_by_redundancy(log_weights: Tensor, redundancy: float) -> Tensor:
    """Blocks' bridge rank value [B, G, M], lowest = strongest bridge: minus the mean of W - redundancy * (W @ W).

    W - redundancy * (W @ W) is a direct connection less its two-hop detours: triangles lower it where they raise
    Forman's curvature, so the highest is the bridge. The sign is turned here so that both orders read alike.
    """
    adjacency, weights = neighbour_graph(log_weights), log_weights.exp()
    return -block_values(weights - redundancy * (weights @ weights), weights, adjacency)
