"""CAB: its shares, its graph, and the sign by which it chooses bridges."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cab_attention import CAB, curvature
from cab_attention.cut import select_slots
from cab_attention.methods import CachedKeys
from tests.methods.numpy_rules import bridge_values, forman


def kept_positions(method: CAB, keys: torch.Tensor, scores: torch.Tensor) -> list[int]:
    """Of one row and head: keys [K, D], scores [K]."""
    n, b = len(keys), method.budget
    budget = torch.tensor([[[b]]])
    cached = CachedKeys(
        keys=keys[None, None],
        values=keys[None, None],
        positions=torch.arange(n)[None, None],
        scores=scores[None, None].float(),
        queries=None,
        budget=budget,
    )
    return select_slots(method.priorities(cached), cached.valid, budget, b)[0, 0].tolist()


@pytest.mark.parametrize(
    ("budget", "ratios", "shares"),
    [
        (10, (0.3, 0.2, 0.5), (3, 2, 5)),
        (64, (0.3, 0.2, 0.5), (19, 12, 33)),
        (7, (0.3, 0.2, 0.5), (2, 1, 4)),
        (1, (0.3, 0.2, 0.5), (1, 0, 0)),
        (2, (0.3, 0.2, 0.5), (1, 0, 1)),
        (3, (0.0, 1.0, 0.0), (1, 2, 0)),
        (5, (1.0, 0.0, 0.0), (5, 0, 0)),
        (10, (0.1, 0.2, 0.7), (1, 2, 7)),
    ],
)
def test_shares(budget, ratios, shares):
    method = CAB(budget, local_ratio=ratios[0], bridge_ratio=ratios[1], importance_ratio=ratios[2])
    assert method.shares(budget) == shares
    assert method.effective(budget) == {"window_eff": shares[0]}


@pytest.mark.parametrize(
    "ratios", [(0.3, 0.2, 0.6), (0.5, 0.6, -0.1), (0.3, 0.2, 0.5 + 1e-6), (1.0, 1.0, 1.0), (float("nan"), 0.5, 0.5)]
)
def test_ratios_that_do_not_sum_to_one_are_refused(ratios):
    with pytest.raises(ValueError, match="sum to 1"):
        CAB(64, local_ratio=ratios[0], bridge_ratio=ratios[1], importance_ratio=ratios[2])


def test_ratios_may_miss_one_by_rounding():
    CAB(64, local_ratio=0.1, bridge_ratio=0.2, importance_ratio=0.7)
    CAB(64, local_ratio=1 / 3, bridge_ratio=1 / 3, importance_ratio=1 / 3 + 1e-12)


GRAPHS = {  # edges and the curvature of each, by hand: 4 - deg - deg + 3 triangles
    "triangle": ([(0, 1), (0, 2), (1, 2)], [3, 3, 3]),
    "path": ([(0, 1), (1, 2), (2, 3)], [1, 0, 1]),
    "star": ([(0, 1), (0, 2), (0, 3), (0, 4)], [-1, -1, -1, -1]),
    "complete": ([(a, c) for a in range(5) for c in range(a + 1, 5)], [5] * 10),
    "two triangles and a bridge": (
        [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5)],
        [3, 2, 2, -2, 2, 2, 3],
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_forman_curvature_by_hand(name):
    edges, expected = GRAPHS[name]
    assert [forman(edges)[edge] for edge in edges] == expected
    adjacency = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    for a, c in edges:
        adjacency[..., a, c] = adjacency[..., c, a] = True
    every_pair = torch.arange(6).expand_as(adjacency)
    graph = curvature.BlockGraph(every_pair, adjacency.float(), adjacency)
    curvatures = graph.forman_curvature()[0, 0]
    assert [int(curvatures[a, c]) for a, c in edges] == expected
    assert torch.equal(curvatures, curvatures.T)


def planted_keys(seed: int, blocks_each: int, bridge_norm: float, block_size=8, dim=64) -> tuple[torch.Tensor, int]:
    """Blocks of two clusters in random order, and one of keys that point to both. Returns keys and the bridge block.

    `bridge_norm`: of the bridge's keys along each cluster, the clusters' own being 1.
    """
    random = np.random.default_rng(seed)
    clusters = np.linalg.qr(random.normal(size=(dim, 2)))[0].T * 0.5 * dim**0.5
    centres = [clusters[c] for c in random.permutation([0, 1] * blocks_each)]
    bridge = int(random.integers(len(centres)))  # never the last block, where the local share lies
    centres.insert(bridge, bridge_norm * clusters.sum(0))
    keys = np.concatenate([centre + 0.25 * random.normal(size=(block_size, dim)) for centre in centres])
    return torch.tensor(keys, dtype=torch.float32), bridge


@pytest.mark.parametrize(
    ("bridge", "blocks_each", "bridge_norm", "found"),
    [("curvature", 4, 0.8, 0.85), ("curvature", 6, 1.5, 0.85), ("redundancy", 6, 1.5, 0.65)],
)
def test_the_planted_bridge_is_chosen_first(bridge, blocks_each, bridge_norm, found):
    """And by the opposite sign it is not: the two selectors have opposite signs, which are easily mixed up."""
    method = CAB(9, local_ratio=0.0, bridge_ratio=1.0, importance_ratio=0.0, bridge=bridge, block_size=8)
    first = last = 0
    for seed in range(50):
        keys, planted = planted_keys(seed, blocks_each, bridge_norm)
        kept = kept_positions(method, keys, torch.ones(len(keys)))
        first += kept == [*range(8 * planted, 8 * planted + 8), len(keys) - 1]

        representatives, exists = curvature.block_representatives(keys[None, None], torch.ones(1, 1, len(keys)) > 0, 8)
        weights = curvature.block_log_weights(representatives, exists)
        orders = {
            "curvature": curvature.bridge_order_by_curvature(weights),
            "redundancy": curvature.bridge_order_by_redundancy(weights, 0.5),
        }
        last += int(orders[bridge].argmax()) == planted
    assert first >= found * 50
    assert last <= 0.2 * 50


@pytest.mark.parametrize("redundancy", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bridge", ["curvature", "redundancy"])
def test_block_values_against_numpy(bridge, redundancy):
    for seed in range(10):
        representatives = torch.randn(1, 1, 14, 8, generator=torch.Generator().manual_seed(seed))
        weights = curvature.block_log_weights(representatives, torch.ones(1, 1, 14, dtype=torch.bool))
        if bridge == "curvature":
            values = curvature.bridge_order_by_curvature(weights)
        else:
            values = curvature.bridge_order_by_redundancy(weights, redundancy)
        expected = bridge_values(representatives[0, 0].double().numpy(), bridge, redundancy)
        np.testing.assert_allclose(values[0, 0].numpy(), expected, atol=2e-4 if bridge == "curvature" else 1e-6)


def test_blocks_whose_edges_share_one_curvature_tie():
    """In a complete graph rounding must not order the blocks: the lower one comes first."""
    for seed in range(20):
        representatives = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(seed))
        weights = curvature.block_log_weights(representatives, torch.ones(1, 1, 5, dtype=torch.bool))
        assert curvature.bridge_order_by_curvature(weights).unique().tolist() == [5.0]


def test_a_block_is_represented_by_its_longest_key():
    keys = torch.zeros(1, 1, 10, 2)
    keys[0, 0, :, 0] = torch.tensor([0.0, 9.0, 1.0, 5.0, 2.0, 5.0, 3.0, 1.0, 2.0, 4.0])  # slot 0, 1: empty
    keys[0, 0, :, 1] = torch.arange(10.0) / 1000
    valid = torch.arange(10)[None, None] >= 2
    representatives, exists = curvature.block_representatives(keys, valid, 3)
    assert (representatives[0, 0, :3, 1] * 1000).round().tolist() == [3, 5, 9]
    assert exists.tolist() == [[[True, True, True, False]]]


def test_median_takes_the_keys_in_the_middle():
    scores = torch.tensor([9.0, 1, 8, 2, 7, 3, 6, 4, 5, 0])
    method = CAB(6, local_ratio=0.2, bridge_ratio=0.5, importance_ratio=0.3, bridge="median")
    assert method.shares(6) == (1, 3, 2)
    # local 9; importance 0 and 2; left are the scores 1 to 7, and in their middle 3, 4, 5
    assert kept_positions(method, torch.randn(10, 4), scores) == [0, 2, 5, 7, 8, 9]


def test_median_of_an_even_count_takes_the_lower_position_first():
    scores = torch.tensor([0.7, 0.1, 0.5, 0.3, 0.0])  # one local, one bridge: 0.3 and 0.5 are as near to 0.4
    method = CAB(2, local_ratio=0.5, bridge_ratio=0.5, importance_ratio=0.0, bridge="median")
    assert kept_positions(method, torch.randn(5, 4), scores) == [2, 4]


@pytest.mark.parametrize("bridge", ["curvature", "redundancy"])
def test_fewer_than_six_blocks_give_the_bridge_share_to_importance(bridge):
    generator = torch.Generator().manual_seed(1)
    keys, scores = torch.randn(24, 4, generator=generator), torch.rand(24, generator=generator)
    heavy_hitters = sorted({23, 22, 21} | {*scores[:21].topk(7).indices.tolist()})
    assert kept_positions(CAB(10, bridge=bridge, block_size=5), keys, scores) == heavy_hitters  # 5 blocks
    assert kept_positions(CAB(10, bridge=bridge, block_size=4), keys, scores) != heavy_hitters  # 6 blocks


def test_the_last_block_is_cut_by_score():
    keys, planted = planted_keys(0, 4, 0.8)
    method = CAB(4, local_ratio=0.25, bridge_ratio=0.75, importance_ratio=0.0, block_size=8)
    scores = torch.rand(len(keys), generator=torch.Generator().manual_seed(0))
    best = (scores[8 * planted : 8 * planted + 8].topk(3).indices + 8 * planted).tolist()
    assert kept_positions(method, keys, scores) == [*sorted(best), len(keys) - 1]


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("bridge", ["curvature", "redundancy", "median"])
def test_nothing_is_built_over_tokens_times_tokens(bridge):
    n, dim = 4096, 16
    with LargestTensor() as largest:
        kept = kept_positions(CAB(512, bridge=bridge, block_size=32), torch.randn(n, dim), torch.rand(n))
    assert len(set(kept)) == 512
    assert n <= largest.elements <= n * dim
