"""What an eviction method is: a rule that ranks the cached keys of one layer. Nothing else."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cab_attention.budget import Budget


@dataclass(frozen=True)
class CachedKeys:
    """One layer's cached keys at the moment of an eviction, in text order, empty slots at the front.

    Attributes:
        keys: [B, G, K, D], after RoPE.
        positions: int64 [B, G, K], original positions, -1 for an empty slot.
        scores: float32 [B, G, K], summed over the query heads of a group, over the queries that the method observes;
            None if it observes nothing.
        budget: int64 [B, 1, 1], tokens to keep, a row.
        layer_index: of the model.
        sample_ids: one a row; rows of one sample draw the same random numbers.
    """

    keys: Tensor
    positions: Tensor
    scores: Tensor | None
    budget: Tensor
    layer_index: int
    sample_ids: tuple[str, ...]

    @property
    def valid(self) -> Tensor:
        """Bool [B, G, K]: the slot holds a key."""
        return self.positions >= 0

    @property
    def count(self) -> Tensor:
        """int64 [B, G, 1]: keys present."""
        return self.valid.sum(-1, keepdim=True)

    @property
    def from_start(self) -> Tensor:
        """int64 [B, G, K]: 0 for the oldest key present, negative for an empty slot."""
        return self.from_end.neg() + self.count - 1

    @property
    def from_end(self) -> Tensor:
        """int64 [1, 1, K]: 0 for the newest key."""
        n_keys = self.positions.shape[-1]
        return torch.arange(n_keys - 1, -1, -1, device=self.positions.device)[None, None]

    def observed(self) -> Tensor:
        """`scores`, for methods that asked for them."""
        if self.scores is None:
            raise RuntimeError("the cache gathered no scores for a method that ranks by them")
        return self.scores


@dataclass(frozen=True)
class Method(ABC):
    """Which keys to keep. Subclasses are frozen dataclasses whose fields are the method's options.

    Class attributes:
        name: in configs, tables and plots.
        observes: queries whose softmax weights make the scores: `all` since the sequence began (they go on
            accumulating), the last `window` of the prompt, `last` of each forward (replaced), or `nothing`.
        evicts_in_decode: rank and cut again after every decode step, not only after the prompt.
    """

    name: ClassVar[str]
    observes: ClassVar[Literal["nothing", "all", "window", "last"]]
    evicts_in_decode: ClassVar[bool]
    budget: int | float | str

    def __post_init__(self) -> None:
        Budget.parse(self.budget)

    @property
    def parsed_budget(self) -> Budget:
        """The budget, parsed."""
        return Budget.parse(self.budget)

    @property
    def evicts(self) -> bool:
        """False if everything stays, whatever the prompt."""
        return self.parsed_budget.kind != "full"

    def observation_window(self) -> int:
        """Last query rows of the prompt that make the scores (for `observes = "window"`)."""
        return 1

    def effective(self, budget_tokens: int) -> dict[str, int]:
        """Options as they act at this budget, for the record (a tiny budget must not be all window)."""
        return {}

    @abstractmethod
    def priorities(self, cached: CachedKeys) -> Tensor:
        """float [B, G, K], higher is kept first, ties: the lower position. Empty slots may hold anything."""


def at_least(method: str, option: str, value: int, minimum: int) -> None:
    """Raise ValueError unless an integer option is in range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{method}: {option}={value!r}, allowed is an integer >= {minimum}")


def select_slots(priorities: Tensor, valid: Tensor, budget: Tensor, width: int) -> Tensor:
    """Slots to keep: int64 [B, G, width] in ascending order, -1 (empty) at the front.

    Of the valid slots the `budget` [B, 1, 1] of highest priority stay; among equals the lower slot.
    """
    ranked = priorities.masked_fill(~valid, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :width]
    wanted = torch.arange(ranked.shape[-1], device=ranked.device) < budget
    return torch.where(wanted & valid.gather(-1, ranked), ranked, -1).sort(-1).values
