"""Which keys each method keeps, written a second time: plain numpy and sets, on full attention matrices."""

import math
from itertools import combinations

import numpy as np

from cab_attention import CAB, H2O, TOVA, Method, SnapKV, StreamingLLM


def best(score, among, count):
    """The `count` positions of highest score, of equals the lower position."""
    return set(sorted(among, key=lambda p: (-score[p], p))[: max(0, count)])


def streaming_llm(method, score, present, keys, b):
    sinks = min(method.sinks, b // 2)
    return {*present[:sinks], *present[len(present) - (b - sinks) :]}


def h2o(method, score, present, keys, b):
    r = b // 2 if method.recent is None else min(method.recent, b // 2)
    old, recent = present[: len(present) - r], present[len(present) - r :]
    return best(score, old, b - r) | {*recent}


def snapkv(method, score, present, keys, b):
    w = min(method.window, b // 2)
    old, window = present[: len(present) - w], present[len(present) - w :]
    half = method.kernel_size // 2
    line = np.concatenate([np.zeros(half), score[old], np.zeros(half)])
    reduce = np.mean if method.pooling == "avg" else np.max
    pooled = {p: reduce(line[i : i + method.kernel_size]).round(9) for i, p in enumerate(old)}
    return best(pooled, old, b - w) | {*window}


def tova(method, score, present, keys, b):
    return best(score, present, b)


def cab(method, score, present, keys, b):
    n_local = max(1, math.floor(method.local_ratio * b))
    n_bridge = min(math.floor(method.bridge_ratio * b), b - n_local)
    blocks = [present[i : i + method.block_size] for i in range(0, len(present), method.block_size)]
    if method.bridge != "median" and len(blocks) < 6:
        n_bridge = 0
    kept = {*present[len(present) - n_local :]}
    kept |= best(score, {*present} - kept, b - n_local - n_bridge)
    rest = {*present} - kept
    if method.bridge == "median":
        middle = np.median(score[sorted(rest)])
        return kept | best(-abs(score - middle).round(9), rest, n_bridge)  # the two in the middle tie
    if n_bridge == 0:
        return kept
    for block in bridge_order(blocks, keys, method):
        kept |= best(score, rest & {*block}, b - len(kept))
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


RULES = {H2O: h2o, SnapKV: snapkv, TOVA: tova, CAB: cab, StreamingLLM: streaming_llm}
OBSERVES = {H2O: "all", CAB: "all", SnapKV: "window", TOVA: "last", StreamingLLM: "nothing"}
EVICTS_IN_DECODE = {H2O, CAB, TOVA, StreamingLLM}


class BruteForceLayer:
    """One layer and one sample: every key is remembered, `present[g]` are the positions that head g still has."""

    def __init__(self, method: Method, n_kv_heads: int, sliding_window: int | None = None) -> None:
        self.method, self.kind, self.window = method, type(method), sliding_window
        self.present: list[list[int]] = [[] for _ in range(n_kv_heads)]
        self.keys: np.ndarray | None = None
        self.cumulative = np.zeros((n_kv_heads, 0))
        self.budget: int | None = None

    def forward(self, q, k, scale):
        """q [H, n, D], k [G, n, D]: attention of the new queries, then the cut."""
        self.keys = k if self.keys is None else np.concatenate([self.keys, k], 1)
        n_heads, n_new, seen = len(self.present), q.shape[1], self.keys.shape[1]
        before, group = seen - n_new, len(q) // len(self.present)
        visible = np.zeros((n_heads, n_new, seen), bool)
        for head, present in enumerate(self.present):
            present += range(before, seen)
            visible[head][:, present] = True
        distance = np.arange(before, seen)[:, None] - np.arange(seen)
        visible &= (distance >= 0) & (distance < (self.window or seen))
        logits = np.einsum("ghqd,gkd->ghqk", q.reshape(n_heads, group, n_new, -1), self.keys) * scale
        weights = np.exp(np.where(visible[:, None], logits - logits.max(), -np.inf))
        weights = (weights / weights.sum(-1, keepdims=True)).sum(1)  # [G, n, seen]: a group's query heads together
        score = self.observe(weights)
        if self.window:
            self.present = [[p for p in present if p >= seen - (self.window - 1)] for present in self.present]
        if before == 0 or self.kind in EVICTS_IN_DECODE:
            self.cut(score, seen)

    def observe(self, weights):
        observes = OBSERVES[self.kind]
        if observes == "all":
            grown = np.zeros((len(weights), weights.shape[2]))
            grown[:, : self.cumulative.shape[1]] = self.cumulative
            self.cumulative = grown + weights.sum(1)
            return self.cumulative
        if observes == "window":
            return weights[:, -self.method.window :].sum(1)
        if observes == "last":
            return weights[:, -1].sum(0)[None].repeat(len(weights), 0)
        return weights[:, 0] * 0

    def cut(self, score, seen):
        if self.budget is None:  # resolved once, at the first cut
            asked = self.method.budget
            self.budget = asked if isinstance(asked, int) else max(1, math.floor(asked * seen + 0.5))
        b = min(self.budget, self.window - 1) if self.window else self.budget
        for head, present in enumerate(self.present):
            if len(present) > b:
                kept = RULES[self.kind](self.method, score[head], present, self.keys[head], b)
                self.present[head] = sorted(kept)
