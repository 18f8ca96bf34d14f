"""Where a prompt ends, where it is compressed, and what its budget comes to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cab_attention.budget import Budget


@dataclass
class Prompt:
    """Where the prompt ends, in tokens (columns of `input_ids`, padding included). Shared by a cache's layers."""

    tokens: int | None
    compress_at: int | None
    sample_ids: tuple[str, ...] | None
    first_forward: int | None = None

    def fix(self, seen: int) -> tuple[int, int]:
        """(tokens, compress_at), the first forward being the whole prompt unless it was said otherwise."""
        if self.first_forward is None:
            self.first_forward = seen
        tokens = self.first_forward if self.tokens is None else self.tokens
        return tokens, tokens if self.compress_at is None else self.compress_at

    def ids(self, n_batch: int) -> tuple[str, ...]:
        """A sample id a row: those given, each for as many rows as it has beams, or "" for all."""
        given = self.sample_ids or ("",)
        if n_batch % len(given):
            raise ValueError(f"EvictingCache got {len(given)} sample ids for a batch of {n_batch}")
        return tuple(name for name in given for _ in range(n_batch // len(given)))  # beams of a row lie together

    def check_step(self, before: int, seen: int) -> None:
        """Raise ValueError if tokens `before` to `seen` may not come in one forward."""
        prompt_tokens, compress_at = self.fix(seen)
        for name, end in (("compress_at", compress_at), ("prompt_tokens", prompt_tokens)):
            if before < end < seen:
                raise ValueError(f"a forward from token {before} to {seen} runs over {name}={end}: split it there")
        if seen - before > 1 and before >= prompt_tokens:
            raise ValueError(
                f"a forward of {seen - before} tokens after the prompt of {prompt_tokens}: for a prompt fed in chunks, "
                "or text that follows a compressed context, give EvictingCache(prompt_tokens=..., compress_at=...)"
            )


@dataclass(frozen=True)
class RowBudgets:
    """A budget in tokens, for the rows of a batch.

    Attributes:
        tokens: int64 [B, 1, 1].
        most: of the row with the most.
        is_final: it was resolved on all that is compressed.
    """

    tokens: Tensor
    most: int
    is_final: bool

    @classmethod
    def resolve(
        cls, budget: Budget, n_rows: int, device: torch.device, n_tokens: int, padding: Tensor | None, is_final: bool
    ) -> "RowBudgets":
        """On `n_tokens` tokens, `padding` [B] of which are none in a row (None: there is no padding)."""
        if padding is None or isinstance(budget.value, int):  # the device is not waited for
            most = budget.value if isinstance(budget.value, int) else budget.tokens(n_tokens)
            return cls(torch.full((n_rows, 1, 1), most, device=device), most, is_final)
        rows = [budget.tokens(n_tokens - n) for n in padding.tolist()]
        return cls(torch.tensor(rows, device=device)[:, None, None], max(rows, default=0), is_final)
