"""What eviction costs on a GPU, beside the attention of the same layer: choosing keys, scoring fewer queries, layouts.

    python scripts/benchmark_eviction.py            # writes results/eviction/costs.csv; an NVIDIA GPU, three minutes

One layer of a 7B shape (32 query heads, 8 KV heads, head dim 128, bfloat16, causal), random queries, keys and values.
Rows of the CSV, by `part`; ms are p50, p20 and p80, by `mode`: `plain` calls, back to back, which have to wait for the
host where launching them takes longer than computing them; or replays of a CUDA `graph`, the GPU's time alone.
    attention   the operator's output, with scores of all, every 8th, and the last 64 queries, and without scores
    cut         what a method takes to choose `budget` of `n_keys` keys and gather them; `share` is of the attention
                with scores at as many keys. `curvature` and `redundancy` are CAB's order of blocks alone
    decode      appending one token and attending to all, where heads keep different numbers of keys (`budget` on
                average, the longest twice that): stored as `ragged` (RaggedKeys), as `padded` (a rectangle for the
                longest head), and as `even`: a rectangle of as many keys in all, the bound for any layout. `peak_mib`
                is what is stored between two steps
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_records import ROOT, STAMP, stamp, write_rows
from kernel_timing import Percentiles, free, peak_bytes, time_calls, time_graph
from torch import Tensor

from cab_attention import (
    CAB,
    H2O,
    AdaKV,
    KeyDiff,
    KeyNorm,
    Method,
    PyramidKV,
    SnapKV,
    flash_attention_with_cumulative_scores,
)
from cab_attention.cut import gather_slots, slots_to_keep
from cab_attention.methods.base import CachedKeys
from cab_attention.ragged import RaggedKeys

COLUMNS = ("part", "what", "mode", "n_keys", "budget", "ms", "ms_p20", "ms_p80", "share", "peak_mib", *STAMP)
HEADS, KV_HEADS, DIM = 32, 8, 128
LENGTHS = (8192, 32768, 131072)
CUT_BUDGET = 1024
DECODE_BUDGETS = (512, 2048, 8192)
SCORED: dict[str, dict[str, int]] = {
    "no scores": dict(score_queries=0),
    "all queries": {},
    "every 8th query": dict(score_step=8),
    "last 64 queries": dict(score_queries=64),
}
METHODS: dict[str, Callable[[int], Method]] = {
    "h2o": H2O,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "cab curvature": CAB,
    "cab redundancy": lambda budget: CAB(budget, bridge="redundancy"),
    "cab median": lambda budget: CAB(budget, bridge="median"),
}
READS_BACK = ("pyramidkv", "adakv")  # the largest budget of a head, which no graph can
Row = dict[str, Any]


def tensors(n_tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, N, D]; k, v [1, G, N, D]."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, heads, n_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def row(part: str, what: str, n_keys: int, ms: Percentiles, mode: str = "plain", **figures: Any) -> Row:
    return dict(part=part, what=what, mode=mode, n_keys=n_keys, ms=ms.p50, ms_p20=ms.p20, ms_p80=ms.p80) | figures


def measure_attention_and_cuts(n_keys: int, device: str) -> list[Row]:
    """The operator, then every method's cut of as many keys."""
    q, k, v = tensors(n_keys, device)
    options: dict[str, Any] = dict(is_causal=True, per_kv_head=True)
    rows = []
    for what, scored in SCORED.items():
        ms = time_calls(lambda scored=scored: flash_attention_with_cumulative_scores(q, k, v, **options, **scored))
        rows.append(row("attention", what, n_keys, ms))
    attention_ms = next(found["ms"] for found in rows if found["what"] == "all queries")
    scores = flash_attention_with_cumulative_scores(q, k, v, **options)[1]
    cached = CachedKeys(
        keys=k,
        values=v,
        positions=torch.arange(n_keys, device=device).expand(1, KV_HEADS, n_keys),
        scores=scores,
        budget=torch.tensor([[[CUT_BUDGET]]], device=device),
        peers=(3, 28),
    )

    def cut(method: Method) -> tuple[Tensor, Tensor]:
        slots = slots_to_keep(method, [cached], CUT_BUDGET).clamp(min=0)
        return gather_slots(k, slots), gather_slots(v, slots)

    calls: dict[str, Callable[[], Any]] = {
        name: lambda make=make: cut(make(CUT_BUDGET)) for name, make in METHODS.items()
    }
    for bridge in ("curvature", "redundancy"):
        method = CAB(CUT_BUDGET, bridge=bridge)  # type: ignore[arg-type]
        calls[bridge] = lambda method=method: method.block_order(cached)
    for name, call in calls.items():
        modes = {"plain": time_calls(call)}
        peak = peak_bytes(call) / 2**20
        if name not in READS_BACK:
            modes["graph"] = time_graph([call])
        for mode, ms in modes.items():
            figures = dict(budget=CUT_BUDGET, share=ms.p50 / attention_ms, peak_mib=peak)
            rows.append(row("cut", name, n_keys, ms, mode, **figures))
    return rows


def measure_decode(budget: int, device: str) -> list[Row]:
    """One step of one layer: append a token, attend to all, for heads of 1/4 to 2 times the budget."""
    lengths = [budget * eighths // 8 for eighths in (2, 4, 6, 6, 8, 10, 12, 16)]
    longest = max(lengths)
    q, k, v = tensors(longest, device)
    q, new_k, new_v = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    valid = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device)[None, :, None]
    mask = torch.cat([valid, valid[..., :1] | True], dim=2)
    ragged = RaggedKeys(k, v, valid)
    kept, later = ragged._kept, ragged._later
    even_k, even_v = k[:, :, : sum(lengths) // KV_HEADS].contiguous(), v[:, :, : sum(lengths) // KV_HEADS].contiguous()

    def attend(keys: Tensor, values: Tensor, key_mask: Tensor | None) -> Tensor:
        options: dict[str, Any] = dict(is_causal=True, score_queries=0)
        return flash_attention_with_cumulative_scores(q, keys, values, key_mask=key_mask, **options)[0]

    def with_ragged() -> Tensor:
        ragged._kept, ragged._later = kept, later  # as at the cut
        return attend(*ragged.append(new_k, new_v), mask)

    calls = {
        "even": lambda: attend(torch.cat([even_k, new_k], dim=2), torch.cat([even_v, new_v], dim=2), None),
        "padded": lambda: attend(torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2), mask),
        "ragged": with_ragged,
    }
    torch.testing.assert_close(calls["padded"](), calls["ragged"](), rtol=0, atol=0)
    held = {"even": even_k.nbytes + even_v.nbytes, "padded": k.nbytes + v.nbytes, "ragged": ragged.nbytes}
    return [
        row("decode", name, longest, measure(call), mode, budget=budget, peak_mib=held[name] / 2**20)
        for name, call in calls.items()
        for mode, measure in (("plain", time_calls), ("graph", lambda call: time_graph([call])))
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "eviction" / "costs.csv")
    parser.add_argument("--commit", help="recorded instead of this checkout's")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs an NVIDIA GPU: what is measured are its kernels")
    rows = []
    with torch.inference_mode():
        for n_keys in LENGTHS:
            rows += measure_attention_and_cuts(n_keys, "cuda")
            free()
        for budget in DECODE_BUDGETS:
            rows += measure_decode(budget, "cuda")
            free()
    for found in rows:
        figures = {
            name: f"{found[name]:.4g}" for name in ("ms", "ms_p20", "ms_p80", "share", "peak_mib") if name in found
        }
        found |= figures | stamp(options.commit)
        print(" ".join(str(found.get(name, "")) for name in ("part", "what", "mode", "n_keys", "budget", *figures)))
    write_rows(options.output, rows, COLUMNS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
