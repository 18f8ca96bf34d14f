"""Measure the kernels and everything beside them on one NVIDIA GPU: results/kernels/benchmarks.csv.

    python scripts/benchmark_kernels.py                          # all groups, some minutes
    python scripts/benchmark_kernels.py --only ratio decode      # these groups; the others' rows stay in the CSV
    python scripts/benchmark_kernels.py --max-keys 2048 --output /tmp/first.csv   # a short trial

A group's rows are written when the group is done and replace its old ones. A provider is timed only after its result
was checked against a direct computation (kernel_checks.py); one that is wrong, not installed or out of memory has a row
without numbers and a note that says why. Times are medians (p50) with p20 and p80 between CUDA events: mode "call" is
plain calls, with whatever of their launches the GPU waits for; mode "graph" is CUDA-graph replay. `floor` is the least
time that output and scores can take at the rates of group `machine`, measured in the same run (kernel_timing.floor_ms).
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

# The libraries of this checkout, installed or not; another installed package may be named `experiments`.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_records import RESULTS, merged, read_rows, stamp, write_rows
from kernel_checks import Shape
from kernel_comparison import Comparison
from kernel_timing import Percentiles, Rates, copy_rate, free, matmul_rate, max_clock_mhz

Sizes = Callable[..., list[int]]  # those of the given numbers of keys that are asked for
EXPS_PER_CLOCK = 16  # of one SM's special-function units, on compute capability 8 and 9
BOTH = ("call", "graph")
GRAPH_KEYS = 8192  # longer calls than these take far longer than their launches
FLEX_KEYS = (2048, 8192, 32768)  # each is compiled anew


def machine(bench: Comparison, sizes: Sizes) -> None:
    """The rates that the floors are computed from."""
    found = []
    for size in (4096, 8192):
        found.append(matmul_rate(size))
        note = f"product of two {size} x {size} bfloat16 matrices, random data"
        bench.add("matmul", "rate", "TFLOP/s", found[-1].times(1e-12), mode="call", note=note)
    copied = copy_rate(2**30)
    bench.add("copy", "rate", "GB/s", copied.times(1e-9), mode="call", note="1 GiB, bytes read and written")
    free()
    clock, exps = max_clock_mhz(), None
    if clock is None:
        bench.add("exp", "rate", "Gexp/s", None, note="nvidia-smi does not say the maximum clock: not in the floors")
    else:
        n_sms = torch.cuda.get_device_properties(0).multi_processor_count
        exps = EXPS_PER_CLOCK * n_sms * clock * 1e6
        note = f"computed: {EXPS_PER_CLOCK} a clock x {n_sms} SMs x {clock:g} MHz, the maximum clock"
        bench.add("exp", "rate", "Gexp/s", Percentiles(exps * 1e-9), note=note)
    bench.rates = Rates(max(rate.p50 for rate in found), copied.p50, exps)


def ratio(bench: Comparison, sizes: Sizes) -> None:
    """Output and scores against the forward alone, and against what else there is, over N."""
    for n in sizes(512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072):
        shape = Shape(n, n)
        providers = ["cudnn", "ours", "sdpa_flash", "sdpa_cudnn", "flash_colsum", "eager"]
        measures = BOTH if n <= GRAPH_KEYS else ("call",)
        bench.compare(shape, providers + ["flex_lse"] * (n in FLEX_KEYS), measures)
        bench.add_floor(shape)
        bench.add_ratio(shape, "ours", "cudnn", measures)


def score_queries(bench: Comparison, sizes: Sizes) -> None:
    """What it costs when only the last queries count, as for SnapKV."""
    for n in sizes(32768):
        shape = Shape(n, n, score_queries=64)
        bench.compare(shape, ["cudnn", "ours"], ["call"])
        bench.add_floor(shape)
        bench.add_ratio(shape, "ours", "cudnn", ["call"])


def table(bench: Comparison, sizes: Sizes) -> None:
    """Against eager attention with scores, without grouped heads, in float16."""
    for n in sizes(512, 1024, 2048, 4096):
        shape = Shape(n, n, kv_heads=32, dtype="float16")
        bench.compare(shape, ["ours", "eager"], BOTH)
        bench.add_ratio(shape, "eager", "ours", BOTH)


def memory(bench: Comparison, sizes: Sizes) -> None:
    """Peak memory beyond the inputs."""
    for n in sizes(2048, 4096, 8192, 32768, 131072):
        shape = Shape(n, n)
        bench.compare(shape, ["ours", "sdpa_flash", "sdpa_cudnn", "eager"], ["memory"])
        peak = bench.found.get((shape, "ours", "memory"))
        if peak is None:
            continue
        beyond = Percentiles(peak.p50 - shape.q_bytes / 2**20)
        bench.add("ours", "peak_beyond_output", "MiB", beyond, shape, "call", "peak_memory less the output's bytes")
        sums = Percentiles(4 * shape.batch * shape.heads * (shape.n_queries + shape.n_keys) / 2**20)
        bench.add("ours", "lse_and_scores", "MiB", sums, shape, note="computed: float32, a row and a key of each head")


def decode(bench: Comparison, sizes: Sizes) -> None:
    """One query, K and V from memory: each call of a graph reads others than the last ones."""
    bench.time_unit = "us"
    for n in sizes(1024, 4096, 32768, 131072):
        shape = Shape(1, n)
        bench.compare(shape, ["ours", "sdpa", "sdpa_repeated"], ["graph"], rotate=True)
        bench.add_floor(shape)


def shapes(bench: Comparison, sizes: Sizes) -> None:
    """Other head dims, batches and head counts. flash_colsum's causal kernel reads 64 dims, no more."""
    cases = [Shape(n, n, head_dim=dim) for dim in (64, 256) for n in sizes(4096, 16384)]
    cases += [Shape(n, n, batch=8) for n in sizes(4096)]
    cases += [Shape(n, n, heads=28, kv_heads=4) for n in sizes(4096, 32768)]
    for shape in cases:
        bench.compare(shape, ["cudnn", "ours"] + ["flash_colsum"] * (shape.head_dim == 64), ["call"])
        bench.add_floor(shape)
        bench.add_ratio(shape, "ours", "cudnn", ["call"])


def harness(bench: Comparison, sizes: Sizes) -> None:
    """Prefill of a whole model."""
    from benchmark_harness_prefill import LENGTHS, measure_prefills  # transformers takes seconds to import

    lengths = tuple(sizes(*LENGTHS))
    if lengths:
        measure_prefills(bench, lengths)


GROUPS: dict[str, Callable[[Comparison, Sizes], None]] = {
    function.__name__: function for function in (machine, ratio, score_queries, table, memory, decode, shapes, harness)
}


def run(groups: Sequence[str], output: Path, commit: str | None, max_keys: int | None) -> list[str]:
    """Measure the groups, after `machine`, and write each when it is done; returns the names of those that failed."""
    made_with, failed, rates = stamp(commit), [], None
    for name in dict.fromkeys(["machine", *groups]):
        bench = Comparison(name, rates)
        try:
            GROUPS[name](bench, lambda *sizes: [n for n in sizes if max_keys is None or n <= max_keys])
            free()  # a kernel that failed late, fails here
        except Exception:  # the groups that follow do not depend on it; its old rows stay
            traceback.print_exc()
            failed.append(name)
            continue
        rates = bench.rates if name == "machine" else rates
        write_rows(output, merged(read_rows(output), [row | made_with for row in bench.rows], {name}))
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "benchmarks.csv")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git checkout")
    parser.add_argument("--max-keys", type=int, help="leave out larger sizes; give another --output with it")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU")
    read_rows(options.output)  # a file that cannot be merged into is refused before anything is measured
    torch.set_float32_matmul_precision("highest")  # for the checks
    with torch.no_grad():
        failed = run(options.only, options.output, options.commit, options.max_keys)
    for row in read_rows(options.output):
        if row["unit"] == "ratio" and row["group"] in options.only:
            size = f"{row['n_queries']} x {row['n_keys']}, batch {row['batch']}, heads {row['heads']}/{row['kv_heads']}"
            figure = f"{row['provider']} {row['what']} {float(row['p50']):.3f}"
            print(f"{row['group']:13} {size}, dim {row['head_dim']}, {row['mode']}: {figure}")
    print(f"{options.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
