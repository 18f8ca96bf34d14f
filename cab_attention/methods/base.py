"""What an eviction method is: a rule that ranks cached keys, and when the cache is cut by it. Nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from cab_attention.budget import LARGEST, Budget
from cab_attention.tensor_parallel import HeadRanks

Granularity = Literal["head", "layer", "model"]
Positions = Literal["original", "compacted"]
EvictInPrefill = Literal["end", "chunk"]
T = TypeVar("T")


@dataclass(frozen=True)
class CachedKeys:
    """One layer's cached keys at the moment of an eviction, in text order, empty slots at the front.

    What competes as one set (`granularity` layer or model) is one head here, G = 1.

    Attributes:
        keys: [B, G, K, D], after RoPE, as attention sees them. Of a set, the keys of its heads side by side, of those
            heads that are on this rank.
        values: [B, G, K, Dv], likewise.
        positions: int64 [B, G, K], original positions, -1 for an empty slot.
        scores: float32 [B, G, K]. For `Method.scores` what was observed: softmax weights summed over the query heads of
            a group and over the observed queries, None if the method observes none. For `Method.priorities` and
            `Method.budgets` what `Method.scores` made of it, summed over the heads of a set.
        queries: for `observes = "queries"`: of the n queries to come, a function of n: their mean [B, H, D] and
            covariance [B, H, D, D], scaled so that k.q / sqrt(D) is the model's logit.
        budget: int64 [B, 1, 1], tokens to keep in each layer and KV head, a row.
        layer_index: of the model; a set over layers has the last one's.
        peers: which of how many the layer is among those of its kind: with full attention, or with its sliding window.
        sample_ids: one a row; rows of one sample draw the same random numbers.
        ranks: of a tensor-parallel model, the ranks over which the layer's heads lie, G on each; None if all are here.
        computed_once: by name, what methods that differ in nothing but the budget have computed of these same keys;
            None if there are no others.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor | None
    budget: Tensor
    queries: Callable[[int], tuple[Tensor, Tensor]] | None = None
    layer_index: int = 0
    peers: tuple[int, int] = (0, 1)
    sample_ids: tuple[str, ...] = ("",)
    ranks: HeadRanks | None = None
    computed_once: dict[str, Any] | None = None
    _known: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()`, once an object. (functools.cached_property takes a lock, which torch.compile cannot trace.)"""
        if name not in self._known:
            self._known[name] = compute()
        return self._known[name]

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """`compute()`, or what it gave another such method: it must not depend on the budget."""
        if self.computed_once is None:
            return compute()
        if name not in self.computed_once:
            self.computed_once[name] = compute()
        return self.computed_once[name]

    @property
    def valid(self) -> Tensor:
        """Bool [B, G, K]: the slot holds a key."""
        return self._kept("valid", lambda: self.positions >= 0)

    @property
    def count(self) -> Tensor:
        """int64 [B, G, 1]: keys present."""
        return self._kept("count", lambda: self.valid.sum(-1, keepdim=True))

    @property
    def from_start(self) -> Tensor:
        """int64 [B, G, K]: 0 for the oldest key present, negative for an empty slot."""
        return self._kept("from_start", lambda: self.from_end.neg() + self.count - 1)

    @property
    def from_end(self) -> Tensor:
        """int64 [1, 1, K]: 0 for the newest key."""
        device, last = self.positions.device, self.positions.shape[-1] - 1
        return self._kept("from_end", lambda: torch.arange(last, -1, -1, device=device)[None, None])

    def observed(self) -> Tensor:
        """`scores`, for methods that rank by them."""
        if self.scores is None:
            raise RuntimeError("the cache gathered no scores for a method that ranks by them")
        return self.scores


@dataclass(frozen=True)
class Method(ABC):
    """Which keys to keep. Subclasses are frozen dataclasses whose fields are the method's options.

    Options of every method:
        budget: tokens of each layer and KV head (int), a fraction of the prompt (float in (0, 1)), or "full".
        granularity: what chooses its keys by itself: each KV "head"; each "layer", by scores summed over its heads; or
            the whole "model", by scores summed over layers and heads.
        evict_every: decode steps from one cut to the next, for methods that evict in decode. Scores go on accumulating
            in between, and the cache grows to at most budget + evict_every - 1 tokens.
        evict_in_prefill: of a prompt fed in chunks: "end" cuts after the last one (the result is that of one pass),
            "chunk" after each (another algorithm).
        positions: kept keys stay at their "original" RoPE positions, or move up to close the gaps ("compacted": the
            newest key stays where it is, every other one comes right before the next; StreamingLLM's own rule).

    Class attributes:
        name: in configs, tables and plots.
        observes: `all`: softmax weights of the queries since the sequence began (they go on accumulating); `window`: of
            the last queries of the prompt; `last`: of each forward's last query (replaced); `queries`: the queries'
            mean and covariance; or `nothing`.
        evicts_in_decode: rank and cut again in decode, not only after the prompt.
        granularities: those that make sense.
        budgets_vary_by_head: `budgets` differ between the heads of a layer.
        evicts_in_chunks: `evict_in_prefill="chunk"` makes sense.
    """

    name: ClassVar[str]
    observes: ClassVar[Literal["nothing", "all", "window", "last", "queries"]]
    evicts_in_decode: ClassVar[bool]
    granularities: ClassVar[tuple[Granularity, ...]] = ("head",)
    budgets_vary_by_head: ClassVar[bool] = False
    evicts_in_chunks: ClassVar[bool] = True
    budget: int | float | str
    granularity: Granularity = field(default="head", kw_only=True)
    evict_every: int = field(default=1, kw_only=True)
    evict_in_prefill: EvictInPrefill = field(default="end", kw_only=True)
    positions: Positions = field(default="original", kw_only=True)

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        at_least(self.name, "evict_every", self.evict_every, 1)
        if not self.evicts_in_decode:
            one_of(self.name, "evict_every", self.evict_every, (1,), ": it does not evict in decode")
        one_of(self.name, "granularity", self.granularity, self.granularities)
        one_of(
            self.name, "evict_in_prefill", self.evict_in_prefill, get_args(EvictInPrefill)[: 1 + self.evicts_in_chunks]
        )
        one_of(self.name, "positions", self.positions, get_args(Positions))

    @property
    def parsed_budget(self) -> Budget:
        """The budget, parsed."""
        return Budget.parse(self.budget)

    @property
    def evicts(self) -> bool:
        """False if everything stays, whatever the prompt."""
        return self.parsed_budget.kind != "full"

    @property
    def ranks_by_keys(self) -> bool:
        """`priorities` looks at keys, not only at scores: a set over heads or layers then needs them side by side."""
        return False

    def observed_queries(self) -> tuple[int | None, int]:
        """(window, step): of the prompt's last `window` queries (None: all) every `step`-th one makes the scores."""
        return None, 1

    def effective(self, budget_tokens: int) -> dict[str, int]:
        """Options as they act at this budget, for the record (a tiny budget must not be all window)."""
        return {}

    def scores(self, cached: CachedKeys) -> Tensor | None:
        """float32 [B, G, K], what each key is worth to each head, higher is better; None if keys have no worth."""
        return cached.scores

    @abstractmethod
    def priorities(self, cached: CachedKeys) -> Tensor:
        """float [B, G, K], higher is kept first, ties: the lower position. Empty slots may hold anything."""

    def budgets(self, cached: CachedKeys) -> Tensor:
        """int64 [B, 1 or G, 1], tokens to keep in this layer or in each of its heads."""
        return cached.budget


def at_least(method: str, option: str, value: int, minimum: int, maximum: int = LARGEST) -> None:
    """Raise ValueError unless an integer option is in range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{method}: {option}={value!r}, allowed is an integer >= {minimum}")
    if value > maximum:
        raise ValueError(f"{method}: {option}={value!r}, allowed is an integer <= {maximum}")


def one_of(method: str, option: str, value: object, allowed: tuple[object, ...], why: str = "") -> None:
    """Raise ValueError unless an option has one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{method}: {option}={value!r}, allowed is {' or '.join(map(repr, allowed))}{why}")
