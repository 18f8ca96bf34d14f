"""What a method observes of the queries that pass through one layer, forward by forward."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cab_attention.methods.base import Method
from cab_attention.query_moments import QueryMoments
from cab_attention.rotary import Rotary


class Attend(Protocol):
    """Attention over what a layer holds: `query` [B, H, n, D] are the queries of its last n keys but `hidden`."""

    def __call__(
        self, query: Tensor, score_queries: int | None, earlier: Tensor | None = None, *, step: int = 1, hidden: int = 0
    ) -> tuple[Tensor, Tensor]: ...


class Observation:
    """Scores or statistics that one layer gathers for its method.

    Attributes:
        scores: float32 [B, G, K], softmax weights summed over the observed queries; None if there are none (yet).
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.scores: Tensor | None = None
        self._recent_queries: Tensor | None = None  # of a prompt fed in chunks, where a window of queries is observed
        self._moments: QueryMoments | None = None

    def attend(self, attend: Attend, query: Tensor, *, before: int, compress_at: int, cuts: bool) -> Tensor:
        """Attention of `query` [B, H, n, D], tokens `before` to before + n, with the scores that the method wants.

        `cuts`: an eviction follows. Returns the output [B, H, n, D].
        """
        observes, (window, step) = self.method.observes, self.method.observed_queries()
        seen = before + query.shape[2]
        if before == 0 and seen == compress_at:
            rows, step = self.request()
            output, scores = attend(query, rows, step=step)
            self.scores = None if rows == 0 else scores
            return output
        if not self.method.evicts or observes in ("nothing", "queries"):
            return attend(query, 0)[0]
        if observes == "last":
            output, self.scores = attend(query, 1 if cuts else 0)
            return output
        if window is not None and seen <= compress_at:
            return self._attend_with_window(attend, query, window, before, compress_at)
        if observes == "window":
            return attend(query, 0)[0]
        # Every step-th query counts, before and after the last of what is compressed, which does.
        after = (seen - compress_at) % step
        if after == 0:
            output, self.scores = attend(query, None, self.scores, step=step)
            return output
        output, none = attend(query, 0)
        earlier = none if self.scores is None else _longer(self.scores, none.shape[2])
        if after < query.shape[2]:
            _, scores = attend(query[:, :, :-after], None, step=step, hidden=after)
            earlier = earlier + _longer(scores, none.shape[2])
        self.scores = earlier
        return output

    def request(self) -> tuple[int | None, int]:
        """The operator's (score_queries, score_step) in a forward of all that is compressed."""
        observes = self.method.observes
        if not self.method.evicts or observes in ("nothing", "queries"):
            return 0, 1
        return (1, 1) if observes == "last" else self.method.observed_queries()

    def _attend_with_window(self, attend: Attend, query: Tensor, window: int, before: int, compress_at: int) -> Tensor:
        """Scores of the window's queries, also when the prompt came in chunks shorter than the window."""
        ends = before + query.shape[2] == compress_at
        if ends and query.shape[2] >= window:
            output, self.scores = attend(query, window)
            self._recent_queries = None
            return output
        output, _ = attend(query, 0)
        earlier = [] if self._recent_queries is None else [self._recent_queries]
        # Cloned: a view would keep the whole chunk alive.
        self._recent_queries = torch.cat([*earlier, query[:, :, -window:]], dim=2)[:, :, -window:].clone()
        if ends:
            _, self.scores = attend(self._recent_queries, None)
            self._recent_queries = None
        return output

    def take_moments(self, rotary: Rotary, query: Tensor, positions: Tensor, real: Tensor | None) -> None:
        """Add the queries [B, H, n, D] at RoPE `positions` int64 [B or 1, n] to their statistics, as before RoPE."""
        if self._moments is None:
            self._moments = QueryMoments()
        self._moments.add_rotated(query, positions, rotary, real)

    def moments(self) -> QueryMoments:
        """Statistics of the queries taken so far."""
        assert self._moments is not None
        return self._moments

    def reach_of_waiting_queries(self, seen: int, compress_at: int) -> int:
        """Keys before a sliding window that observed queries, still to be scored, can see."""
        window, _ = self.method.observed_queries()
        waiting = self.method.evicts and window is not None and seen < compress_at
        return window if waiting and window is not None else 0

    def forget(self) -> None:
        """After the last cut: what was observed has done its work."""
        self.scores = self._moments = None

    def select_slots(self, select: Callable[[Tensor], Tensor]) -> None:
        if self.scores is not None:
            self.scores = select(self.scores)

    def select_rows(self, select: Callable[[Tensor], Tensor]) -> None:
        for name in ("scores", "_recent_queries"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, select(tensor))
        if self._moments is not None:
            self._moments.select_rows(select)


def _longer(scores: Tensor, n_keys: int) -> Tensor:
    return torch.nn.functional.pad(scores, (0, n_keys - scores.shape[2]))
