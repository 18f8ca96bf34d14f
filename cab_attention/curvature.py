"""A graph over blocks of keys, and how much of a bridge each block is. For the CAB method.

Everything is over blocks x blocks; nothing is ever built over tokens x tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cab_attention.tensor_parallel import HeadRanks

NEIGHBOURS = 4  # edges from each block to the blocks it attends to most
FEWEST_BLOCKS = 6  # below this a graph of 4 neighbours says nothing


def block_representatives(
    keys: Tensor, valid: Tensor, block_size: int, ranks: HeadRanks | None = None
) -> tuple[Tensor, Tensor]:
    """The key of largest L2 norm in each block of consecutive keys (max-L2 coarsening).

    Args:
        keys: [B, G, K, D], empty slots at the front.
        valid: bool [B, G, K].
        block_size: keys a block, counted from the first valid key; the last block may be shorter.
        ranks: each of which has D numbers of every key; norms and representatives are the whole keys'.

    Returns:
        float32 representatives [B, G, M, D, of all ranks] and bool [B, G, M], which blocks exist. M = ceil(K /
        block_size).
    """
    n_keys, dim = keys.shape[2:]
    n_blocks = -(-n_keys // block_size)
    empty = n_keys - valid.sum(-1, keepdim=True)
    slot = torch.arange(n_blocks * block_size, device=keys.device) + empty  # [B, G, M * block_size]
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    if ranks is not None:
        norms = torch.linalg.vector_norm(ranks.gather(norms[..., None], dim=-1), dim=-1)
    norms = norms.gather(-1, slot.clamp(max=n_keys - 1))
    norms = norms.masked_fill(slot >= n_keys, -1.0).unflatten(-1, (n_blocks, block_size))
    first = torch.arange(n_blocks, device=keys.device) * block_size + empty
    chosen = (first + norms.argmax(-1)).clamp(max=n_keys - 1)  # of equal norms the lowest position
    representatives = keys.gather(2, chosen[..., None].expand(-1, -1, -1, dim)).float()
    return representatives if ranks is None else ranks.gather(representatives, dim=-1), first < n_keys


def block_log_weights(representatives: Tensor, exists: Tensor) -> Tensor:
    """Log of the symmetric attention between blocks, W = (P + P^T) / 2 with P = softmax(R R^T / sqrt(D)).

    A block never attends to itself. The log keeps the order of weights that float32 would round to 0 (long keys).
    representatives float32 [B, G, M, D], exists bool [B, G, M] -> [B, G, M, M], -inf off pairs of two existing blocks.
    """
    n_blocks, dim = representatives.shape[2:]
    logits = (representatives * dim**-0.5) @ representatives.mT
    itself = torch.eye(n_blocks, dtype=torch.bool, device=logits.device)
    no_pair = ~(exists[..., :, None] & exists[..., None, :]) | itself
    log_attention = logits.masked_fill_(no_pair, -torch.inf).log_softmax(-1).masked_fill_(no_pair, -torch.inf)
    return torch.logaddexp(log_attention, log_attention.mT).sub_(math.log(2))


@dataclass(frozen=True)
class BlockGraph:
    """Edges from each block to the blocks that it is tied to most, taken both ways.

    Attributes:
        strongest: int64 [B, G, M, n], each block's strongest neighbours; the block itself where there are no more.
        weights: float32 [B, G, M, n], W of those edges; 0 where there is none.
        chosen: bool [B, G, M, M], the row's block has the column's among its strongest.
    """

    strongest: Tensor
    weights: Tensor
    chosen: Tensor

    @classmethod
    def of(cls, log_weights: Tensor, neighbours: int = NEIGHBOURS) -> "BlockGraph":
        """From log W [B, G, M, M]; of equal weights the lower block's edge is taken."""
        left = log_weights.clone()
        itself = torch.arange(left.shape[-1], device=left.device)[:, None]
        strongest, weights = [], []
        for _ in range(min(neighbours, left.shape[-1])):  # a few maxima cost less than a sort
            highest, block = left.max(-1, keepdim=True)
            left.scatter_(-1, block, -torch.inf)
            strongest.append(torch.where(highest > -torch.inf, block, itself))
            weights.append(highest)
        edges, log_w = torch.cat(strongest, dim=-1), torch.cat(weights, dim=-1)
        chosen = torch.zeros_like(left, dtype=torch.bool).scatter_(-1, edges, log_w > -torch.inf)
        return cls(edges, log_w.exp(), chosen)

    @property
    def adjacency(self) -> Tensor:
        """Bool [B, G, M, M], symmetric."""
        return self.chosen | self.chosen.mT

    def forman_curvature(self) -> Tensor:
        """Augmented Forman-Ricci curvature [B, G, M, n] of each edge: 4 - deg(a) - deg(c) + 3 x (triangles through it).

        The unweighted form with triangles as faces: Samal et al. 2018, Scientific Reports 8, 8650. No meaning where
        there is no edge.
        """
        adjacency = self.adjacency
        degree = adjacency.sum(-1, dtype=torch.float32)
        degrees = degree[..., None] + degree.gather(-1, self.strongest.flatten(2)).view(self.strongest.shape)
        return 4 - degrees + 3 * _common_neighbours(adjacency).gather(-1, self.strongest)

    def detours(self, all_weights: Tensor) -> Tensor:
        """Two-hop paths [B, G, M, n] between the ends of each edge: W @ W there. all_weights: W [B, G, M, M]."""
        paths = [
            (all_weights * all_weights.gather(-2, other.expand_as(all_weights))).sum(-1, keepdim=True)
            for other in self.strongest.split(1, dim=-1)
        ]
        return torch.cat(paths, dim=-1)

    def mean_by_block(self, values: Tensor) -> Tensor:
        """A block's value [B, G, M]: the mean of its edges' values [B, G, M, n], weighted by W."""
        # An edge that both ends chose is in both lists; one that only the other end chose is brought over.
        one_way = ~self.chosen.mT.gather(-1, self.strongest)

        def total(of_edges: Tensor) -> Tensor:
            brought = torch.zeros_like(self.chosen, dtype=torch.float32)
            return of_edges.sum(-1) + brought.scatter_(-1, self.strongest, of_edges * one_way).sum(-2)

        return total(self.weights * values) / total(self.weights).clamp(min=torch.finfo(torch.float32).tiny)


def _common_neighbours(adjacency: Tensor) -> Tensor:
    """float32 [B, G, M, M], exact: how many blocks are adjacent to both."""
    if adjacency.is_cuda:  # zeros and ones in half precision, summed in single
        ones = adjacency.flatten(0, 1).half()
        return torch.bmm(ones, ones, out_dtype=torch.float32).view(adjacency.shape)
    ones = adjacency.float()
    return ones @ ones


def bridge_order_by_curvature(log_weights: Tensor) -> Tensor:
    """Blocks' bridge rank value [B, G, M], lowest = strongest bridge: mean Forman-Ricci curvature.

    An edge between two communities closes no triangles, so its curvature is low.
    """
    graph = BlockGraph.of(log_weights)
    # Curvatures are small integers: blocks whose edges share one must tie, whatever the rounding of the weights.
    return graph.mean_by_block(graph.forman_curvature()).round(decimals=4)


def bridge_order_by_redundancy(log_weights: Tensor, redundancy: float) -> Tensor:
    """Blocks' bridge rank value [B, G, M], lowest = strongest bridge: minus the mean of W - redundancy * (W @ W).

    W - redundancy * (W @ W) is a direct connection less its two-hop detours: triangles lower it where they raise
    Forman's curvature, so the highest is the bridge. The sign is turned here so that both orders read alike.
    """
    graph = BlockGraph.of(log_weights)
    return -graph.mean_by_block(graph.weights - redundancy * graph.detours(log_weights.exp()))
