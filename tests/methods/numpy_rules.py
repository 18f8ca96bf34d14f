"""Which keys each method keeps, written a second time: plain numpy, sets and fractions.

A rule (method, score, present, keys, b) orders the positions `present` of a head, or of heads that choose together:
those to keep come first. `score` and `keys` are indexed by position.
"""

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations

import numpy as np

from cab_attention import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    PyramidKV,
    SnapKV,
    StreamingLLM,
)


def ranked(score, among):
    """From the highest score to the lowest, of equals the lower position first."""
    return sorted(among, key=lambda p: (-score[p], p))


def highest_score(method, score, present, keys, b):
    return ranked(score, present)


def streaming_llm(method, score, present, keys, b):
    sinks = min(method.sinks, b // 2)
    return present[:sinks] + present[sinks:][::-1]


def h2o(method, score, present, keys, b):
    r = b // 2 if method.recent is None else min(method.recent, b // 2)
    old, recent = present[: len(present) - r], present[len(present) - r :]
    return recent + ranked(score, old)


def old_and_window(method, present, b):
    w = min(method.window, b // 2)
    return present[: len(present) - w], present[len(present) - w :]


def pooled(method, score, old):
    half = method.kernel_size // 2
    line = np.concatenate([np.zeros(half), score[old], np.zeros(half)])
    reduce = np.mean if method.pooling == "avg" else np.max
    return {p: reduce(line[i : i + method.kernel_size]).round(9) for i, p in enumerate(old)}


def snapkv(method, score, present, keys, b):
    old, window = old_and_window(method, present, b)
    return window + ranked(pooled(method, score, old), old)


def expected_attention(method, score, present, keys, b):
    sinks = min(method.sinks, b // 2)
    return present[:sinks] + ranked(score, present[sinks:])


def cab(method, score, present, keys, b):
    n_local = max(1, math.floor(method.local_ratio * b))
    n_bridge = min(math.floor(method.bridge_ratio * b), b - n_local)
    blocks = [present[i : i + method.block_size] for i in range(0, len(present), method.block_size)]
    if method.bridge != "median" and len(blocks) < 6:
        n_bridge = 0
    kept = present[len(present) - n_local :]
    kept += ranked(score, {*present} - {*kept})[: b - n_local - n_bridge]
    rest = {*present} - {*kept}
    if method.bridge == "median":
        middle = np.median(score[sorted(rest)])
        return kept + ranked(-abs(score - middle).round(9), rest)  # the two in the middle tie
    for block in bridge_order(blocks, keys, method) if n_bridge else []:
        kept += ranked(score, rest & {*block})
    return kept


def bridge_order(blocks, keys, method):
    representatives = np.stack([max(keys[block], key=np.linalg.norm) for block in blocks])
    values = bridge_values(representatives, method.bridge, method.redundancy)
    return [blocks[i] for i in np.argsort(values, kind="stable")]


def bridge_values(representatives, bridge, redundancy=0.5):
    """Of each block; the lowest is the strongest bridge."""
    n, dim = representatives.shape
    logits = representatives @ representatives.T / math.sqrt(dim)
    np.fill_diagonal(logits, -np.inf)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    w = (p + p.T) / 2
    near = [{*np.argsort(-w[a], kind="stable")[: min(4, n - 1)].tolist()} for a in range(n)]
    edges = {(a, c) for a, c in combinations(range(n), 2) if c in near[a] or a in near[c]}
    curvature = forman(edges)
    total, weight = np.zeros(n), np.zeros(n)
    for a, c in edges:
        value = curvature[a, c] if bridge == "curvature" else -(w - redundancy * (w @ w))[a, c]
        for block in (a, c):
            total[block] += w[a, c] * value
            weight[block] += w[a, c]
    return (total / weight).round(4) if bridge == "curvature" else total / weight


def forman(edges):
    """Augmented Forman-Ricci curvature {(a, c): F} of an unweighted graph given as pairs a < c."""
    near: dict = {}
    for a, c in edges:
        near.setdefault(a, set()).add(c)
        near.setdefault(c, set()).add(a)
    return {(a, c): 4 - len(near[a]) - len(near[c]) + 3 * len(near[a] & near[c]) for a, c in edges}


RULES = {
    StreamingLLM: streaming_llm,
    H2O: h2o,
    SnapKV: snapkv,
    PyramidKV: snapkv,
    AdaKV: snapkv,
    TOVA: highest_score,
    KeyNorm: highest_score,
    KeyDiff: highest_score,
    ExpectedAttention: expected_attention,
    CAB: cab,
}


def largest_remainders(exact, total):
    """Whole numbers that sum to `total`: rounded down, then one more to the largest fractions, of equals the first."""
    whole = [math.floor(x) for x in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    return [n + (i in by_fraction[: total - sum(whole)]) for i, n in enumerate(whole)]


def pyramidkv_budgets(method, n_keys, n_layers, b):
    """Of each layer, where b < n_keys."""
    w = min(method.window, b // 2)
    share = b - w
    last = Fraction(share, method.beta)
    if 2 * share - last > n_keys - w:
        last = Fraction(2 * share - (n_keys - w))
    step = Fraction(2 * (share - last), max(1, n_layers - 1))
    exact = [2 * share - last - layer * step if n_layers > 1 else share for layer in range(n_layers)]
    return [w + n for n in largest_remainders(exact, n_layers * share)]


def adakv_budgets(method, scores, present, b):
    """Of each head, where b is less than the keys there are: scores and positions by head."""
    share, n_heads = b - min(method.window, b // 2), len(present)
    contest = []
    for head in range(n_heads):
        old, _ = old_and_window(method, present[head], b)
        contest += [(-value, p, head) for p, value in pooled(method, scores[head], old).items()]
    won = Counter(head for _, _, head in sorted(contest)[: n_heads * share])
    safe = Fraction(str(method.safeguard))
    exact = [(1 - safe) * won[head] + safe * share for head in range(n_heads)]
    return [b - share + n for n in largest_remainders(exact, n_heads * share)]


def key_norm_worth(keys, present):
    return -np.linalg.norm(keys, axis=-1)


def key_diff_worth(keys, present):
    units = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    anchor = units[present].mean(0)
    return -units @ anchor / max(np.linalg.norm(anchor), 1e-12)


def expected_attention_worth(queries, keys, values, competing, scale, n_future, theta):
    """Of one head's keys [K, D], by its query heads' queries [g, N, D], rotated to positions 0 to N - 1."""
    n, dim = queries.shape[1:]
    future = np.mean([rope(np.eye(dim), np.full(dim, p), theta).T for p in range(n, n + n_future)], axis=0)
    worth = np.zeros(len(keys))
    for plain in rope(queries, -np.arange(n), theta)[:, 4:]:
        mean, covariance = np.zeros(dim), np.zeros((dim, dim))
        if len(plain):
            mean, covariance = future @ plain.mean(0), future @ np.cov(plain.T, bias=True) @ future.T
        weights = {}
        for p in competing:
            k = scale * keys[p]
            weights[p] = math.exp(k @ mean + k @ covariance @ k / 2)
        for p in competing:
            worth[p] += weights[p] / sum(weights.values()) / len(queries) * np.linalg.norm(values[p])
    return worth


def rope(x, positions, theta=10_000.0):
    """x [..., n, D] rotated by positions [n], of any sign: the halves of x are the real and imaginary parts."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** -(np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], -1)
