"""What one shared prefill costs beside the separate ones that it stands for: 6 methods at 4 budgets on one prompt.

    python scripts/benchmark_shared_prefill.py                              # an NVIDIA GPU, minutes at 16k
    python scripts/benchmark_shared_prefill.py --shape tiny --tokens 512 --output cpu.csv

A model of the named shape with random weights, a prompt of random tokens, attention `cab`; budgets of 1/64 to 1/8 of
the prompt. Every figure is the median of five synchronised runs (decode: two) after a warm-up. Rows of the CSV, by
`part`:
    prefill    the full cache, nothing cut: `no_scores`, and `all_scores` (H2O's, whose budget is the whole prompt)
    shared     one prefill that fills and cuts the caches of all methods and budgets; `peak_mib` is over the weights
    separate   a prefill for each method and budget, its cut included; `all` is their sum
    decode     16 tokens from each cut; `all` is their sum
`in_prefills` is the time in prefills with all scores, `in_plain_prefills` in those without scores.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_records import ROOT, STAMP, stamp, write_rows
from kernel_timing import free, percentiles
from torch import Tensor
from transformers import PreTrainedModel

from cab_attention import CAB, H2O, TOVA, EvictingCache, Full, KeyDiff, Method, SharedPrefill, SnapKV, StreamingLLM
from experiments.longbench_qa.greedy import GreedyDecoder
from experiments.longbench_qa.memory import MemoryMeter
from experiments.longbench_qa.models import load
from experiments.longbench_qa.schema import ModelConfig
from experiments.longbench_qa.shapes import SHAPES

TIMES = ("ms", "ms_p20", "ms_p80", "in_prefills", "in_plain_prefills", "peak_mib")
COLUMNS = ("part", "method", "budget", "shape", "dtype", "device", "tokens", "repeats", *TIMES, *STAMP)
METHODS = (StreamingLLM, H2O, SnapKV, TOVA, KeyDiff, CAB)
SHARES = (64, 32, 16, 8)  # of the prompt: budgets of 256, 512, 1024 and 2048 tokens at 16384
NEW_TOKENS = 16
REPEATS, DECODE_REPEATS = 5, 2
CLAIM = 1.5  # prefills with all scores that the shared one with its cuts may take
Row = dict[str, Any]
Run = tuple[float, int | None]
"""ms, and peak bytes over the weights (None on a CPU)."""


class Measurement:
    """The model and its prompt, and what is measured on them."""

    def __init__(self, model: PreTrainedModel, n_tokens: int) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, model.config.vocab_size, (1, n_tokens), generator=generator).to(model.device)
        model(self.ids[:, :64], logits_to_keep=1)  # libraries take their workspaces before memory is counted
        self.meter = MemoryMeter(model.device)

    def prefill(self, cache: EvictingCache | SharedPrefill) -> tuple[Run, Tensor]:
        """Feed the prompt; its cost, and the first token [1, 1]."""
        started = self.meter.start()
        _, token = GreedyDecoder(self.model, cache).step(self.ids)
        return self.meter.stop(started), token

    def alone(self, method: Method) -> Run:
        """A prefill for this method, cut included."""
        return self.prefill(EvictingCache(self.model.config, method))[0]

    def together(self, methods: Sequence[Method], decode: bool = False) -> tuple[Run, list[Run]]:
        """One prefill for all methods; then, if asked for, decode from each of their caches."""
        caches = [EvictingCache(self.model.config, method) for method in methods]
        prefill, first = self.prefill(SharedPrefill(caches))
        return prefill, [self.decode(cache, first) for cache in caches] if decode else []

    def decode(self, cache: EvictingCache, token: Tensor) -> Run:
        decoder, started = GreedyDecoder(self.model, cache), self.meter.start()
        for _ in range(NEW_TOKENS):
            _, token = decoder.step(token)
        run = self.meter.stop(started)
        cache.check_saw(self.ids.shape[1] + NEW_TOKENS)
        return run


def repeated(call: Callable[[], Any], times: int) -> list[Any]:
    """The results of so many calls after one that does not count."""
    free()
    call()
    return [call() for _ in range(times)]


def row(part: str, method: str, budget: int | str, runs: Sequence[Run]) -> Row:
    ms, peaks = percentiles([ms for ms, _ in runs]), [peak for _, peak in runs if peak is not None]
    peak = max(peaks) / 2**20 if peaks else None
    return dict(
        part=part,
        method=method,
        budget=budget,
        repeats=len(runs),
        ms=ms.p50,
        ms_p20=ms.p20,
        ms_p80=ms.p80,
        peak_mib=peak,
    )


def summed(part: str, rows: Sequence[Row]) -> Row:
    """Of a part's rows: medians added up, and the highest peak."""
    peaks = [found["peak_mib"] for found in rows if found["peak_mib"] is not None]
    return dict(
        part=part,
        method="all",
        budget="all",
        repeats=rows[0]["repeats"],
        ms=sum(found["ms"] for found in rows),
        peak_mib=max(peaks, default=None),
    )


@torch.inference_mode()
def measure(model: PreTrainedModel, n_tokens: int) -> list[Row]:
    """All rows, without where they were made."""
    measurement = Measurement(model, n_tokens)
    methods = [method(n_tokens // share) for method in METHODS for share in SHARES]  # type: ignore[abstract]
    names = [(method.name, method.parsed_budget.tokens(n_tokens)) for method in methods]
    rows = [
        row("prefill", "no_scores", "full", repeated(lambda: measurement.alone(Full()), REPEATS)),
        row("prefill", "all_scores", "full", repeated(lambda: measurement.alone(H2O(n_tokens)), REPEATS)),
    ]
    rows.append(
        row("shared", "all", "all", [run for run, _ in repeated(lambda: measurement.together(methods), REPEATS)])
    )
    separate = [
        row("separate", *name, repeated(lambda method=method: measurement.alone(method), REPEATS))
        for name, method in zip(names, methods, strict=True)
    ]
    decoded = repeated(lambda: measurement.together(methods, decode=True), DECODE_REPEATS)
    answers = zip(*(runs for _, runs in decoded), strict=True)
    # The other caches are there as well: a peak would be nobody's.
    decode = [row("decode", *name, [(ms, None) for ms, _ in runs]) for name, runs in zip(names, answers, strict=True)]
    rows += [*separate, summed("separate", separate), *decode, summed("decode", decode)]
    plain, scored = rows[0]["ms"], rows[1]["ms"]
    return [found | {"in_prefills": found["ms"] / scored, "in_plain_prefills": found["ms"] / plain} for found in rows]


def told(rows: Sequence[Row]) -> str:
    """What the rows say of the claim."""
    ms = {(found["part"], found["method"]): found["ms"] for found in rows if found["budget"] in ("all", "full")}
    shared, separate = next(found for found in rows if found["part"] == "shared"), ms["separate", "all"]
    n_cuts = sum(found["part"] == "separate" for found in rows) - 1
    peak = "" if shared["peak_mib"] is None else f", peak {shared['peak_mib']:.0f} MiB over the weights"
    holds = "holds" if shared["in_prefills"] <= CLAIM else "does not hold"
    decode = ms["decode", "all"]
    with_answers = (separate + decode) / (shared["ms"] + decode)
    scored, plain = (ms["prefill", name] for name in ("all_scores", "no_scores"))
    return "\n".join(
        [
            f"one prefill: {scored:.4g} ms with all scores, {plain:.4g} without",
            f"one shared prefill with {n_cuts} cuts: {shared['ms']:.4g} ms{peak}",
            f"that is {shared['in_prefills']:.3f} prefills with all scores, {shared['in_plain_prefills']:.3f} without",
            f"{n_cuts} separate prefills: {separate:.4g} ms, {separate / shared['ms']:.2f} times the shared one",
            f"{NEW_TOKENS} tokens from each: {decode:.4g} ms; with them {with_answers:.2f} times the shared way",
            f"at most {CLAIM} prefills with all scores: {holds}",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=("tiny", *SHAPES))
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "eviction" / "shared_prefill.csv")
    parser.add_argument("--commit", help="recorded instead of this checkout's")
    options = parser.parse_args(arguments)
    if options.tokens < max(SHARES):
        parser.error(f"--tokens {options.tokens}: allowed is {max(SHARES)} or more")
    kind = {"kind": "tiny"} if options.shape == "tiny" else {"kind": "random", "shape": options.shape}
    model = load(ModelConfig(name=options.shape, **kind)).model
    rows = measure(model, options.tokens)
    print(told(rows))
    where = dict(shape=options.shape, tokens=options.tokens, dtype=str(model.dtype).removeprefix("torch."))
    where |= stamp(options.commit) | {"device": model.device.type}
    for found in rows:
        found |= {name: f"{found[name]:.5g}" for name in TIMES if found.get(name) is not None} | where
    write_rows(options.output, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
