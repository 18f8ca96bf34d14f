"""Time and memory of a call on a GPU, the rates that the GPU reaches, and the floor that follows from them."""

import gc
import math
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from kernel_checks import Shape

Call = Callable[[], Any]
BUDGET_MS = 400.0  # GPU time of one measurement
GRAPH_MS = 1.0  # a graph of short calls holds as many as take about this long, so that its launch does not count
GRAPH_CALLS = 20  # and no more than this


@dataclass(frozen=True)
class Percentiles:
    """Of repetitions; p20 and p80 are None for a figure that was not repeated."""

    p50: float
    p20: float | None = None
    p80: float | None = None

    def times(self, factor: float) -> "Percentiles":
        p20, p80 = (None if value is None else value * factor for value in (self.p20, self.p80))
        return Percentiles(self.p50 * factor, p20, p80)


def percentiles(values: Sequence[float]) -> Percentiles:
    """p50, p20 and p80, interpolated linearly between the sorted values; of a single value p50 alone."""
    ordered = sorted(values)
    if len(ordered) == 1:
        return Percentiles(ordered[0])

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below, above = math.floor(place), math.ceil(place)
        return ordered[below] + (ordered[above] - ordered[below]) * (place - below)

    return Percentiles(at(0.5), at(0.2), at(0.8))


def repetitions(ms: float) -> int:
    """How often to repeat what takes `ms`: at least 20 times, but 5 or 3 times where that takes seconds."""
    if ms > 200:
        return 3 if ms > 1000 else 5
    return max(20, min(500, int(BUDGET_MS / max(ms, 1e-3))))


def time_calls(call: Call) -> Percentiles:
    """ms of one plain call: between two CUDA events around it, its launches included where the GPU waits for them."""
    return percentiles(_time(call, repetitions(_warm_up(call))))


def time_graph(calls: Sequence[Call]) -> Percentiles:
    """ms a call when one CUDA graph of the calls in turn is replayed, all of them at least once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ms = [_warm_up(call, ms=1.0 if len(calls) > 1 else 50.0) for call in calls][-1]
    torch.cuda.current_stream().wait_stream(side)
    free()
    length = max(len(calls), min(GRAPH_CALLS, math.ceil(GRAPH_MS / max(ms, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in islice(cycle(calls), length):
            call()
    return percentiles(_time(graph.replay, repetitions(_warm_up(graph.replay)))).times(1 / length)


def _warm_up(call: Call, ms: float = 50.0) -> float:
    """Call at least twice, up to 20 times while that takes less than `ms`; returns ms of the last call."""
    total = last = 0.0
    for count in range(20):
        last = _time(call, 1)[0]
        total += last
        if count >= 1 and total > ms:
            break
    return last


def _time(call: Call, count: int) -> list[float]:
    """ms of each of `count` calls, which are queued without waiting for the one before."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def peak_bytes(call: Call) -> int:
    """Peak memory of a call beyond what was allocated before it; its results count."""
    call()  # cuBLAS takes its workspace at its first call and keeps it
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def free() -> None:
    """Give back what nothing holds, after a failed call also what its frames held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Rates:
    """What the GPU does in a second: floating-point operations of a matrix product, bytes copied, exponentials."""

    flops: float
    copied_bytes: float
    exps: float | None  # None: the clock is not known


def visible_pairs(shape: Shape, rows: int) -> int:
    """(query, key) pairs of the last `rows` query rows that attention computes, over batch and heads."""
    pairs = rows * shape.n_keys - (rows * (rows - 1) // 2 if shape.causal else 0)
    return shape.batch * shape.heads * pairs


def floor_ms(shape: Shape, rates: Rates) -> float:
    """The least time for output and scores of this shape at these rates, in ms.

    The forward needs two matrix products and one exponential a visible (query, key) pair; a second pass for the scores,
    which can only begin when a row's sum is known, one product and one exponential a pair of the rows that count. A
    pass takes at least as long as the slower of its two units, and all of it at least as long as reading q, k, v and
    writing output and float32 scores once.
    """

    def pass_seconds(pairs: int, products: int) -> float:
        matmul = 2 * products * shape.head_dim * pairs / rates.flops
        return max(matmul, pairs / rates.exps if rates.exps else 0.0)

    compute = pass_seconds(visible_pairs(shape, shape.n_queries), 2)
    compute += pass_seconds(visible_pairs(shape, shape.counted_rows), 1)
    scores_bytes = 4 * shape.batch * shape.heads * shape.n_keys
    return 1e3 * max(compute, (2 * shape.q_bytes + shape.kv_bytes + scores_bytes) / rates.copied_bytes)


def matmul_rate(size: int) -> Percentiles:
    """FLOP/s of a bfloat16 product of two random size x size matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return _rate(2 * size**3, time_calls(lambda: a @ b))


def copy_rate(n_bytes: int) -> Percentiles:
    """Bytes read and written a second by a copy of `n_bytes` on the device."""
    source = torch.randint(0, 127, (n_bytes,), device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    return _rate(2 * n_bytes, time_calls(lambda: target.copy_(source)))


def _rate(work: float, ms: Percentiles) -> Percentiles:
    """Work a second; the slower times are the lower rates."""
    assert ms.p20 is not None and ms.p80 is not None
    return Percentiles(1e3 * work / ms.p50, 1e3 * work / ms.p80, 1e3 * work / ms.p20)


def max_clock_mhz() -> float | None:
    """The SMs' maximum clock as nvidia-smi says; None if it does not."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        return float(output.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
