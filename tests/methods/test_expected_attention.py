"""Expected attention and the query statistics it rests on, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch

from cab_attention import query_moments
from cab_attention.methods.expected_attention import expected_attention_scores
from cab_attention.query_moments import QueryMoments
from cab_attention.rotary import Rotary
from tests.tiny_models import tiny_model

HEADS, DIM = 4, 8


def moments_by_loops(queries, real, skip):
    """queries [H, n, D] and real [n] of one row -> mean [H, D], covariance [H, D, D], both dividing by the count."""
    counted = [i for i, is_real in enumerate(real) if is_real][skip:]
    mean, covariance = np.zeros(queries.shape[::2]), np.zeros((len(queries), DIM, DIM))
    for head in range(len(queries)):
        for i in counted:
            mean[head] += queries[head, i] / len(counted)
        for i in counted:
            centred = queries[head, i] - mean[head]
            covariance[head] += np.outer(centred, centred) / len(counted)
    return mean, covariance


def random_queries(n_batch, n, seed=0):
    random = np.random.default_rng(seed)
    return torch.tensor(random.normal(size=(n_batch, HEADS, n, DIM)) * np.arange(1, DIM + 1) + 3, dtype=torch.float32)


def assert_moments(moments, queries, real, skip):
    for row in range(len(queries)):
        mean, covariance = moments_by_loops(queries[row].double().numpy(), real[row].tolist(), skip)
        np.testing.assert_allclose(moments.mean[row], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(moments.covariance[row], covariance, rtol=1e-4, atol=1e-4)
    assert moments.mean.dtype == moments.covariance.dtype == torch.float32


@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("sizes", [[61], [1, 2, 3, 55], [30, 31], [59, 1, 1]], ids=str)
def test_moments_of_padded_rows_in_chunks(sizes, skip):
    """Row 1's first real tokens fall into several chunks; row 2 has one token that counts, row 3 none."""
    padding, n = (0, 4, 61 - skip - 1, 61 - max(skip, 1)), 61
    queries, real = random_queries(4, n), torch.arange(n) >= torch.tensor(padding)[:, None]
    if skip == 0:
        real[3] = False
    queries = queries.masked_fill(~real[:, None, :, None], math.nan)  # what padding holds is no matter
    moments = QueryMoments(skip)
    for part, is_real in zip(queries.split(sizes, 2), real.split(sizes, 1), strict=True):
        moments.add(part, is_real)
    assert_moments(moments, queries, real, skip)
    assert not moments.mean[3].any() and not moments.covariance[3].any()


@pytest.mark.parametrize("block", [1, 7, 23])
def test_moments_block_by_block(block, monkeypatch):
    monkeypatch.setattr(query_moments, "BLOCK", block)
    queries = random_queries(2, 61)
    moments = QueryMoments()
    moments.add(queries[:, :, :40])
    moments.add(queries[:, :, 40:])
    assert_moments(moments, queries, torch.ones(2, 61, dtype=torch.bool), 4)


def test_moments_far_from_zero():
    """Means a thousand times the deviation, as biased projections have: float32 sums of squares would cancel."""
    queries = random_queries(1, 61) + 5000
    moments = QueryMoments()
    for part in queries.split(9, 2):
        moments.add(part)
    _, covariance = moments_by_loops(queries[0].double().numpy(), [True] * 61, 4)
    np.testing.assert_allclose(moments.covariance[0], covariance, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("block", [5, 4096])
def test_moments_of_rotated_queries(block, monkeypatch):
    """Queries at RoPE positions, row 1 behind padding, give the statistics of the queries before RoPE."""
    monkeypatch.setattr(query_moments, "BLOCK", block)
    rotary = Rotary(tiny_model("llama", head_dim=DIM).model.layers[0].self_attn)
    queries, real = random_queries(2, 33), torch.arange(33) >= torch.tensor([[0], [6]])
    positions = (real.cumsum(1) - 1).clamp(min=0)
    rotated, moments = rotary.rotate(queries, positions[:, None]), QueryMoments()
    for part in (slice(20), slice(20, 33)):
        moments.add_rotated(rotated[:, :, part], positions[:, part], rotary, real[:, part])
    assert_moments(moments, queries, real, 4)
    unpadded = QueryMoments()
    unpadded.add_rotated(rotated[:1], positions[:1], rotary)
    torch.testing.assert_close(unpadded.covariance, moments.covariance[:1], atol=1e-4, rtol=1e-4)


def test_moments_follow_their_rows():
    queries = random_queries(3, 20)
    moments, expected = QueryMoments(), QueryMoments()
    moments.select_rows(lambda tensor: tensor.flip(0))  # nothing there yet
    moments.add(queries[:, :, :11])
    moments.select_rows(lambda tensor: tensor.flip(0))
    moments.add(queries[:, :, 11:].flip(0))
    expected.add(queries.flip(0))
    torch.testing.assert_close(moments.mean, expected.mean)
    torch.testing.assert_close(moments.covariance, expected.covariance, atol=1e-4, rtol=1e-4)


def scores_by_loops(keys, values, mean, covariance, valid):
    """keys [G, K, D], values [G, K, Dv], mean [H, D], covariance [H, D, D], valid [G, K] of one row -> [G, K]."""
    (n_heads, n_keys, dim), group = keys.shape, len(mean) // len(keys)
    scores = np.zeros((n_heads, n_keys))
    for g in range(n_heads):
        present = [j for j in range(n_keys) if valid[g, j]]
        for h in range(g * group, (g + 1) * group):
            weight = {}
            for j in present:
                k = keys[g, j]
                weight[j] = math.exp(k @ mean[h] / math.sqrt(dim) + k @ covariance[h] @ k / (2 * dim))
            for j in present:
                scores[g, j] += weight[j] / sum(weight.values()) / group
        for j in present:
            scores[g, j] *= math.sqrt(sum(values[g, j] ** 2))
    return scores


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1), (6, 2)], ids=str)
def test_scores(heads):
    """Values have another dim than keys; row 1 has empty slots, other ones in each head."""
    (n_heads, n_groups), n_keys, random = heads, 37, np.random.default_rng(1)
    keys, values = random.normal(size=(2, n_groups, n_keys, DIM)), random.normal(size=(2, n_groups, n_keys, 5))
    mean, root = random.normal(size=(2, n_heads, DIM)), random.normal(size=(2, n_heads, DIM, DIM))
    covariance = root @ root.swapaxes(2, 3) / 4
    valid = np.ones((2, n_groups, n_keys), bool)
    valid[1] = random.random((n_groups, n_keys)) > 0.4
    args = [torch.tensor(x, dtype=torch.float32) for x in (keys, values, mean, covariance)]
    scores = expected_attention_scores(*args, torch.tensor(valid))
    assert scores.dtype == torch.float32 and scores.shape == (2, n_groups, n_keys)
    for row in range(2):
        expected = scores_by_loops(keys[row], values[row], mean[row], covariance[row], valid[row])
        np.testing.assert_allclose(scores[row], expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(expected_attention_scores(*(x[:1] for x in args)), scores[:1])


def test_a_row_without_keys_scores_nothing():
    keys, valid = torch.ones(1, 1, 3, DIM), torch.zeros(1, 1, 3, dtype=torch.bool)
    scores = expected_attention_scores(keys, keys, torch.ones(1, 2, DIM), torch.zeros(1, 2, DIM, DIM), valid)
    assert torch.equal(scores, torch.zeros(1, 1, 3))
