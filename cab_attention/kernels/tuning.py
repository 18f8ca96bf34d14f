"""Which tile sizes a kernel runs with: fixed defaults, chosen on an H200, or what is fastest on the GPU at hand.

A choice is keyed on what decides it, never on a length: every prompt has its own, and would be tuned again.
"""

from collections.abc import Callable
from functools import cache, partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

Tile = dict[str, int]
Result = TypeVar("Result")

on = False  # read by every launch
_chosen: dict[tuple[Any, ...], Tile] = {}


def tune_kernels(enable: bool = True) -> None:
    """Time the tile sizes of each kernel on the GPU at hand, in this process, instead of using the fixed defaults.

    The defaults were chosen on an H200 for half precision: this is for other GPUs and for float32. The first call of
    a kernel for a head dim, dtype, set of options and size class (a power of four of the lengths) then compiles and
    times some six variants, which takes up to a minute; later calls reuse the fastest. While a CUDA graph is captured
    nothing is timed: what was not called before runs with the default.

    Choices are kept in memory only, and switching off forgets them. Results stay exact, but other tile sizes sum in
    another order: with tuning on, the last bits may differ from process to process.
    """
    global on
    on = enable
    if not enable:
        _chosen.clear()


def run(
    kernel: str,
    q: Tensor,
    lengths: tuple[int, ...],
    constants: dict[str, Any],
    default: Tile,
    others: list[Tile],
    launch: Callable[[Tile], Result],
) -> Result:
    """`launch(tile)` with the tile sizes for this call, timed now if they are not known; to be called only while `on`.

    `launch` may be called any number of times. `constants` are the kernel's other compile-time arguments; `lengths`
    are how many queries and keys it goes over.

    Raises RuntimeError when the GPU has too little shared memory for every candidate.
    """
    from triton import OutOfResources  # not there on every CPU

    options = (value for name, value in constants.items() if name not in ("N_HEADS", "GROUP"))
    sizes = (size_class(length) for length in lengths)
    # What the default distinguishes (rows of a tile, few programs or many) matters to the others too.
    key = (kernel, _device_name(q.device), q.dtype, *sizes, *options, *default.values())
    if key not in _chosen and others and q.is_cuda and not torch.cuda.is_current_stream_capturing():
        _chosen[key] = _fastest(kernel, [default, *(tile for tile in others if tile != default)], launch)
    try:
        return launch(_chosen.get(key, default))
    except OutOfResources:  # chosen for tensors whose strides need less shared memory
        return launch(default)


def size_class(length: int) -> int:
    """Of a number of queries or keys: the power of four below it; one class up to 1023, one from 262144 on."""
    return max(4, min(9, (length.bit_length() - 1) // 2))


def _fastest(kernel: str, candidates: list[Tile], launch: Callable[[Tile], object]) -> Tile:
    from triton import OutOfResources

    times, problem = [], None
    for tile in candidates:
        try:
            times.append((_milliseconds(partial(launch, tile)), tile))
        except OutOfResources as error:
            problem = error
    if not times:
        raise RuntimeError(f"no tile sizes of kernel {kernel!r} fit this GPU, tried {candidates}") from problem
    return min(times, key=lambda timed: timed[0])[1]


def _milliseconds(launch: Callable[[], object], repeats: int = 7) -> float:
    """Of the GPU, per launch."""
    launch()  # compiles
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        torch.cuda._sleep(500_000)  # a quarter of a millisecond: the GPU must not wait for the host between the events
        start.record()
        launch()
        stop.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(stop) for start, stop in events)


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
