"""The budget: how many tokens a method keeps, per layer and KV head."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

LARGEST = 2**31 - 1  # tokens, and any other integer of a method: they become entries of tensors
ALLOWED = "a token count (int >= 1 and < 2**31), a fraction of the prompt (float in (0, 1)), or 'full' (also 1.0)"


@dataclass(frozen=True)
class Budget:
    """A parsed budget: `kind` says what `value` means (None for `full`)."""

    kind: Literal["tokens", "fraction", "full"]
    value: int | float | None

    @classmethod
    def parse(cls, budget: "int | float | str | Budget") -> "Budget":
        """Read what a user wrote. Raises ValueError for anything that is not a budget."""
        if isinstance(budget, Budget):
            return budget
        if budget == "full" or (isinstance(budget, float) and budget == 1.0):
            return cls("full", None)
        if isinstance(budget, Integral) and not isinstance(budget, bool) and 1 <= budget <= LARGEST:
            return cls("tokens", int(budget))
        if isinstance(budget, Real) and not isinstance(budget, Integral) and 0 < budget < 1:
            return cls("fraction", float(budget))
        raise ValueError(f"budget={budget!r} is not a budget: allowed is {ALLOWED}")

    def tokens(self, n: int) -> int:
        """Tokens to keep of `n` real tokens (never more than `n`).

        A fraction is rounded half up, once, and keeps at least one token.
        """
        if self.kind == "full" or self.value is None:
            return n
        if self.kind == "fraction":
            return min(n, max(1, math.floor(self.value * n + 0.5)))
        return min(n, int(self.value))

    def __str__(self) -> str:
        return "full" if self.kind == "full" else str(self.value)
