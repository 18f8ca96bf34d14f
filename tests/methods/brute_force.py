"""A cache written a second time, in plain numpy: every key is remembered, full attention matrices, one sample."""

import math

import numpy as np

from cab_attention import CAB, H2O, TOVA, AdaKV, ExpectedAttention, KeyDiff, KeyNorm, Method, PyramidKV, StreamingLLM
from tests.methods import numpy_rules
from tests.methods.numpy_rules import RULES, rope

SUMS_ALL, EVICTS_IN_DECODE = (H2O, CAB), (H2O, CAB, TOVA, StreamingLLM)


class BruteForceLayer:
    """One layer. `present[g]` are the positions that head g still has."""

    def __init__(
        self,
        method: Method,
        n_kv_heads: int,
        sliding_window: int | None = None,
        *,
        index: int = 0,
        n_layers: int = 1,
        prompt_tokens: int | None = None,
        compress_at: int | None = None,
        rope_theta: float = 10_000.0,
    ) -> None:
        self.method, self.kind, self.window = method, type(method), sliding_window
        self.index, self.n_layers, self.rope_theta = index, n_layers, rope_theta
        self.prompt_tokens, self.compress_at = prompt_tokens, compress_at
        self.present: list[list[int]] = [[] for _ in range(n_kv_heads)]
        self.scores = np.zeros((n_kv_heads, 0))

    def forward(self, q, k, v, scale):
        """q [H, n, D], k and v [G, n, D]: attention of the new queries, then the cut, unless layers choose together.

        Returns whether a cut is due.
        """
        if not self.scores.shape[1]:
            self.queries, self.keys, self.values = q[:, :0], k[:, :0], v[:, :0]
            self.prompt_tokens = self.prompt_tokens or q.shape[1]
            self.compress_at = self.compress_at or self.prompt_tokens
        before, self.scale = self.keys.shape[1], scale
        self.queries, self.keys, self.values = (
            np.concatenate(pair, 1) for pair in ((self.queries, q), (self.keys, k), (self.values, v))
        )
        self.seen = self.keys.shape[1]
        for present in self.present:
            present += range(before, self.seen)
        self.as_seen = self.keys_as_seen()
        self.observe(self.attention(q, scale), before)
        if self.window:
            self.present = [[p for p in present if p > self.seen - self.window] for present in self.present]
        due = self.cut_is_due(before)
        if due and self.method.granularity != "model":
            cut([self])
        return due

    def keys_as_seen(self):
        """Compacted: the key of rank i among K stands at seen - K + i."""
        if self.method.positions == "original":
            return self.keys
        moved = self.keys.copy()
        for head, present in enumerate(self.present):
            places = np.arange(self.seen - len(present), self.seen)
            moved[head, present] = rope(self.keys[head, present], places - present, self.rope_theta)
        return moved

    def attention(self, q, scale):
        """Weights [G, n, seen], a group's query heads together."""
        n_heads, n = len(self.present), q.shape[1]
        visible = np.zeros((n_heads, n, self.seen), bool)
        for head, present in enumerate(self.present):
            visible[head][:, present] = True
        distance = np.arange(self.seen - n, self.seen)[:, None] - np.arange(self.seen)
        visible &= (distance >= 0) & (distance < (self.window or self.seen))
        logits = np.einsum("ghqd,gkd->ghqk", q.reshape(n_heads, -1, *q.shape[1:]), self.as_seen) * scale
        weights = np.exp(np.where(visible[:, None], logits - logits.max(), -np.inf))
        return (weights / weights.sum(-1, keepdims=True)).sum(1)

    def observe(self, weights, before):
        grown = np.zeros((len(weights), self.seen))
        grown[:, :before] = self.scores
        counted = [i for i in range(weights.shape[1]) if self.counts(before + i)]
        self.scores = weights[:, -1] if self.kind is TOVA else grown + weights[:, counted].sum(1)

    def counts(self, query: int) -> bool:
        """Do this query's weights make scores?"""
        after_last = query - (self.compress_at - 1)
        if self.kind not in SUMS_ALL:
            window = getattr(self.method, "window", 0)
            return -window < after_last <= 0
        which, _, number = self.method.score_queries.partition(":")
        if which == "last":
            return after_last > -int(number)
        return which == "all" or after_last % int(number) == 0

    def cut_is_due(self, before):
        if self.seen <= self.compress_at:
            return self.seen == self.compress_at or self.method.evict_in_prefill == "chunk"
        decoded = self.seen - self.prompt_tokens
        return decoded > 0 and self.kind in EVICTS_IN_DECODE and decoded % self.method.evict_every == 0

    def budget(self):
        asked = self.method.budget
        b = asked if isinstance(asked, int) else max(1, math.floor(asked * self.compress_at + 0.5))
        return min(b, self.window - 1 - len(self.pinned())) if self.window else b

    def pinned(self):
        """What follows the compressed part of the prompt stays, and takes no part."""
        first = self.seen - self.window + 1 if self.window else 0
        return range(max(first, self.compress_at), min(self.prompt_tokens, self.seen))

    def competing(self):
        pinned = self.pinned()
        return [[p for p in present if p not in pinned] for present in self.present]

    def worth(self):
        """[G, seen], of each key to each head."""
        if self.kind in (KeyNorm, KeyDiff):
            of_head = numpy_rules.key_norm_worth if self.kind is KeyNorm else numpy_rules.key_diff_worth
            return np.stack([of_head(*pair) for pair in zip(self.as_seen, self.competing(), strict=True)])
        if self.kind is not ExpectedAttention:
            return self.scores
        sinks = min(self.method.sinks, self.budget() // 2)
        groups = self.queries.reshape(len(self.present), -1, *self.queries.shape[1:])
        return np.stack(
            [
                numpy_rules.expected_attention_worth(
                    groups[g],
                    self.as_seen[g],
                    self.values[g],
                    present[sinks:],
                    self.scale,
                    self.method.n_future,
                    self.rope_theta,
                )
                for g, present in enumerate(self.competing())
            ]
        )

    def budgets(self):
        """Of each head."""
        b, competing = self.budget(), self.competing()
        n_keys = len(competing[0])
        if self.kind is PyramidKV and n_keys > b:
            b = numpy_rules.pyramidkv_budgets(self.method, n_keys, self.n_layers, b)[self.index]
        if self.kind is AdaKV and n_keys > b:
            return numpy_rules.adakv_budgets(self.method, self.scores, competing, b)
        return [b] * len(self.present)


class BruteForceModel:
    """Layers that are fed one after another; `present[l][g]` are the positions that head g of layer l still has."""

    def __init__(self, method: Method, n_layers: int, *args, **kwargs) -> None:
        self.layers = [
            BruteForceLayer(method, *args, **kwargs, index=index, n_layers=n_layers) for index in range(n_layers)
        ]

    def forward(self, q, k, v, scale):
        """q [L, H, n, D], k and v [L, G, n, D]."""
        due = [layer.forward(*x, scale) for layer, *x in zip(self.layers, q, k, v, strict=True)]
        if due[0] and self.layers[0].method.granularity == "model":
            cut(self.layers)

    @property
    def present(self):
        return [layer.present for layer in self.layers]


def cut(layers):
    """Cut layers that choose together, or one layer."""
    method, heads = layers[0].method, [(layer, g) for layer in layers for g in range(len(layer.present))]
    budgets = [b for layer in layers for b in layer.budgets()]
    worth = [score for layer in layers for score in layer.worth()]
    # What chooses its keys as one: indices into `heads`. TOVA's heads always choose together.
    sets = [[i] for i in range(len(heads))] if method.granularity == "head" else [range(len(heads))]
    for members in sets:
        chief, head = heads[members[0]]
        present, pinned = chief.competing()[head], [*chief.pinned()]
        if len(present) <= chief.budget():
            continue
        score = sum(worth[i] for i in members)
        keys = np.concatenate([layer.as_seen[g] for layer, g in (heads[i] for i in members)], -1)
        order = RULES[type(method)](method, score, present, keys, chief.budget())
        for i in members:
            layer, g = heads[i]
            layer.present[g] = sorted(order[: budgets[i]] + pinned)
