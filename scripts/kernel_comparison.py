"""One group of the benchmark: providers on one shape after another, each checked before it is timed."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from benchmark_records import Row, make_row
from kernel_checks import Expected, Inputs, Shape, expect, make_inputs, problem_with
from kernel_providers import PROVIDERS
from kernel_timing import Percentiles, Rates, floor_ms, free, peak_bytes, time_calls, time_graph

ROTATED_BYTES = 2**28  # several times the L2 cache: a decode step of a model finds its K and V in none of it
PER_MS = {"ms": 1.0, "us": 1e3}


class WrongResultError(Exception):
    """A provider's result is wrong: it is not timed."""


def why_not(error: Exception) -> str:
    """What a row without numbers says, in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    first_line = (str(error).strip() or "no message").splitlines()[0][:200]
    if isinstance(error, WrongResultError):
        return f"refused: {first_line}"
    return f"failed: {type(error).__name__}: {first_line}"


class Comparison:
    """Gathers the rows of one group and prints them as they come.

    Measures are "call" and "graph", the time of plain calls and of CUDA-graph replay, and "memory", the peak in MiB
    beyond the inputs.
    """

    def __init__(self, group: str, rates: Rates | None, device: str = "cuda", time_unit: str = "ms") -> None:
        self.group, self.rates, self.device, self.time_unit = group, rates, device, time_unit
        self.rows: list[Row] = []
        self.found: dict[tuple[Shape, str, str], Percentiles] = {}  # by shape, provider and measure
        self._out_of_memory_at: dict[str, int] = {}

    def compare(self, shape: Shape, providers: Sequence[str], measures: Sequence[str], rotate: bool = False) -> None:
        """Measure providers side by side. `rotate`: over as many inputs as do not fit into the cache together."""
        n_sets = -(-ROTATED_BYTES // shape.kv_bytes) if rotate else 1
        sets = [make_inputs(shape, self.device, seed) for seed in range(n_sets)]
        expected = expect(sets[0])
        free()
        for provider in providers:
            smaller = self._out_of_memory_at.get(provider)
            if smaller is not None:
                note = f"not tried: out of memory at {smaller} keys already"
            else:
                note = self._measure(provider, sets, expected, measures)
            for measure in measures:
                if (shape, provider, measure) not in self.found:
                    self._add(shape, provider, measure, None, note)
            if note == "out of memory":
                self._out_of_memory_at[provider] = shape.n_keys
            free()

    def _measure(self, provider: str, sets: list[Inputs], expected: Expected, measures: Sequence[str]) -> str:
        """Add a row for each measure that succeeds; returns why the others have none."""
        try:
            prepared = [PROVIDERS[provider](inputs) for inputs in sets]
            calls = [one.call for one in prepared]
            with ExitStack() as stack:
                stack.enter_context(prepared[0].context())
                problem = problem_with(calls[0](), expected)
                if problem is not None:
                    raise WrongResultError(problem)
                for measure in measures:
                    free()
                    if measure == "memory":
                        numbers = Percentiles(peak_bytes(calls[0]) / 2**20)
                    elif measure == "graph":
                        numbers = time_graph(calls).times(PER_MS[self.time_unit])
                    else:
                        numbers = time_calls(calls[0]).times(PER_MS[self.time_unit])
                    self._add(expected.shape, provider, measure, numbers, prepared[0].note)
        except Exception as error:  # whatever a provider dies of goes on record, and the others go on
            return why_not(error)
        return ""

    def _add(self, shape: Shape, provider: str, measure: str, numbers: Percentiles | None, note: str) -> None:
        if numbers is not None:
            self.found[shape, provider, measure] = numbers
        if measure == "memory":
            self.add(provider, "peak_memory", "MiB", numbers, shape, "call", note)
        else:
            self.add(provider, "time", self.time_unit, numbers, shape, measure, note)

    def add(
        self,
        provider: str,
        what: str,
        unit: str,
        numbers: Percentiles | None,
        shape: Shape | None = None,
        mode: str = "",
        note: str = "",
    ) -> None:
        """Add a row of any kind."""
        row = make_row(self.group, provider, what, unit, numbers, shape, mode, note)
        self.rows.append(row)
        size = "" if shape is None else f"{shape.n_queries} x {shape.n_keys}"
        figure = f"{row['p50'] or '-':>10} {unit:7}"
        print(f"{self.group:13} {provider:14} {what:18} {size:>15} {mode:5} {figure} {note}", flush=True)

    def add_floor(self, shape: Shape) -> None:
        """Add the least time for output and scores at the rates measured in this run."""
        floor, note = None, "the rates of group machine could not be measured"
        if self.rates is not None:
            floor = Percentiles(floor_ms(shape, self.rates) * PER_MS[self.time_unit])
            note = "computed from the rates of group machine"
        self.add("floor", "time", self.time_unit, floor, shape, note=note)

    def add_ratio(self, shape: Shape, provider: str, to: str, measures: Sequence[str]) -> None:
        """Add the ratio of two medians, where both were measured."""
        for measure in measures:
            ours, other = (self.found.get((shape, name, measure)) for name in (provider, to))
            if ours is not None and other is not None:
                self.add(provider, f"time_over_{to}", "ratio", Percentiles(ours.p50 / other.p50), shape, measure)
