"""Are the keys that a method keeps those of one GPU when a model's layers, or their heads, lie on two?

    python scripts/check_two_gpus.py      # writes results/spread/kept_keys.csv; two GPUs, 16 GB of disk, 3 minutes

The model has a named shape and random weights, made sharp; it is saved once, and loaded from there
    alone        on one GPU
    device_map   layer by layer over all GPUs, in one process
    tp_plan      every layer divided over as many processes as there are GPUs (transformers' tensor parallelism)
Each method cuts one prompt of random tokens, from one prefill, and then decodes fixed tokens, so that one different key
does not change all that follows. A row says how many of the keys kept alone are kept there too, right after the prompt
and over all decode steps, and how many of the forwards have the same likeliest next token. Sums over ranks are rounded
otherwise than one GPU's: keys whose scores all but tie may change places. What is asked for, in float32: all keys with
device_map, and a share of NEAR_TIES with tp_plan. bfloat16 is reported as it is.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The library of this checkout, installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_records import ROOT, STAMP, stamp, write_rows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from cab_attention import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    EvictingCache,
    ExpectedAttention,
    KeyDiff,
    Method,
    PyramidKV,
    Random,
    SharedPrefill,
    SnapKV,
    StreamingLLM,
    load_model_with_attention,
)
from experiments.longbench_qa import ranks
from experiments.longbench_qa.memory import devices_of, free_memory
from experiments.longbench_qa.shapes import SHAPES, TINY

NEAR_TIES = 0.999
MAKES: dict[str, Callable[[int], Method]] = {
    "h2o": H2O,
    "h2o layer": lambda b: H2O(b, granularity="layer"),
    "h2o model": lambda b: H2O(b, granularity="model"),
    "tova": TOVA,
    "adakv": AdaKV,
    "snapkv": SnapKV,
    "pyramidkv layer": lambda b: PyramidKV(b, granularity="layer"),
    "cab": CAB,
    "cab layer": lambda b: CAB(b, granularity="layer"),
    "cab model": lambda b: CAB(b, granularity="model"),
    "key_diff layer": lambda b: KeyDiff(b, granularity="layer"),
    "expected_attention": ExpectedAttention,
    "random": Random,
    "streaming_llm compacted": lambda b: StreamingLLM(b, positions="compacted"),
}
COLUMNS = (
    *("shape", "dtype", "placement", "devices", "method", "prompt_tokens", "budget", "decode_steps"),
    *("prompt_keys", "prompt_equal", "decode_keys", "decode_equal", "forwards", "equal_tokens"),
    *STAMP,
)
Kept = tuple[list[list[Tensor]], list[int]]
"""By forward, from the prompt on: each layer's positions [G, kept] (-1: none), and the likeliest next token."""


def save_sharp_model(shape: dict[str, Any], folder: Path) -> None:
    """Random weights in bfloat16 whose attention is about as concentrated as a trained model's.

    The query heads of a KV head are 1 to 4 times as sharp as unit-variance queries and keys; tokens have embeddings of
    their own, and layers write little to the residual stream.
    """
    width, n_layers = shape["hidden_size"], shape["num_hidden_layers"]
    config = AutoConfig.for_model(**shape | {"initializer_range": width**-0.5})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.get_input_embeddings().weight.mul_(width**0.5)
        group = shape["num_attention_heads"] // shape["num_key_value_heads"]
        for layer in model.model.layers:
            head_dim = layer.self_attn.head_dim
            gain = torch.linspace(1, 4, group).repeat(shape["num_key_value_heads"]).repeat_interleave(head_dim)
            layer.self_attn.q_proj.weight.mul_(gain[:, None])
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * n_layers) ** -0.5)
    model.save_pretrained(folder)


@torch.inference_mode()
def kept_keys(model: PreTrainedModel, n_tokens: int, budget: int, n_steps: int) -> dict[str, Kept]:
    """By method what it keeps and answers, from one prefill."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens + n_steps), generator=generator).to(model.device)
    caches = {
        name: EvictingCache(model.config, make(budget), prompt_tokens=n_tokens, sample_ids="0")
        for name, make in MAKES.items()
    }
    together = SharedPrefill([*caches.values()])
    first = model(ids[:, :n_tokens], past_key_values=together, logits_to_keep=1).logits[0, -1].argmax()
    results: dict[str, Kept] = {}
    for name in list(caches):
        cache = caches.pop(name)
        kept, tokens = [positions_of(cache)], [first]
        for n in range(n_tokens, n_tokens + n_steps):
            tokens.append(model(ids[:, n : n + 1], past_key_values=cache).logits[0, -1].argmax())
            kept.append(positions_of(cache))
        cache.check_saw(n_tokens + n_steps)
        results[name] = kept, [int(token) for token in tokens]
    return results


def positions_of(cache: EvictingCache) -> list[Tensor]:
    return [layer.positions[0].cpu() for layer in cache.layers]


def run(folder: Path, dtype: str, arguments: argparse.Namespace, **place: Any) -> tuple[dict[str, Kept], int]:
    """What is kept, and over how many devices of this process the model lay."""
    started = time.perf_counter()
    model = load_model_with_attention(str(folder), "cab", dtype=dtype, **place)
    loaded = time.perf_counter()
    results = kept_keys(model, arguments.tokens, arguments.budget, arguments.steps)
    n_devices = len(devices_of(model))
    if not ranks.is_follower():
        what = ", ".join(f"{key}={value}" for key, value in place.items() if key != "distributed_config") or "tp_plan"
        times = f"loaded in {loaded - started:.0f} s, run in {time.perf_counter() - loaded:.0f} s"
        print(f"{dtype}, {what}, {n_devices} device(s): {times}", flush=True)
    return results, n_devices


def run_as_rank(folder: Path, arguments: argparse.Namespace) -> None:
    """One process of torchrun, which transformers connects with the others: writes its part of the heads."""
    divided = DistributedConfig(tp_plan="auto", tp_size=ranks.n_ranks())
    for dtype in arguments.dtypes:
        results, _ = run(folder, dtype, arguments, distributed_config=divided)
        torch.save(results, folder / f"{dtype}-rank{os.environ['RANK']}.pt")
        free_memory()
    torch.distributed.destroy_process_group()


def all_heads(parts: Sequence[dict[str, Kept]]) -> dict[str, Kept]:
    """The ranks' results as one; raises RuntimeError if they did not answer alike."""
    whole: dict[str, Kept] = {}
    for name, (_, tokens) in parts[0].items():
        if any(part[name][1] != tokens for part in parts):
            raise RuntimeError(f"{name}: the ranks' next tokens differ")
        forwards = zip(*(part[name][0] for part in parts), strict=True)
        whole[name] = [[joined(heads) for heads in zip(*layers, strict=True)] for layers in forwards], tokens
    return whole


def joined(heads: Sequence[Tensor]) -> Tensor:
    """Positions [G, kept] of several ranks in one rectangle."""
    width = max(own.shape[1] for own in heads)
    return torch.cat([torch.nn.functional.pad(own, (width - own.shape[1], 0), value=-1) for own in heads])


def n_equal(one: Sequence[Tensor], other: Sequence[Tensor], n_tokens: int) -> tuple[int, int]:
    """Over the layers of one forward: keys kept in `one`, and how many of them `other` keeps in the same head."""

    def present(positions: Tensor) -> Tensor:
        marked = torch.zeros(len(positions), n_tokens + 1, dtype=torch.bool)
        return marked.scatter_(1, positions + 1, True)[:, 1:]  # the first column is that of empty slots

    pairs = [(present(mine), present(theirs)) for mine, theirs in zip(one, other, strict=True)]
    return sum(int(mine.sum()) for mine, _ in pairs), sum(int((mine & theirs).sum()) for mine, theirs in pairs)


def compare(alone: dict[str, Kept], other: dict[str, Kept], n_tokens: int) -> list[dict[str, Any]]:
    """A row for each method."""
    rows = []
    for name, (kept, tokens) in alone.items():
        counts = [n_equal(mine, theirs, n_tokens) for mine, theirs in zip(kept, other[name][0], strict=True)]
        rows.append(
            dict(
                method=name,
                prompt_keys=counts[0][0],
                prompt_equal=counts[0][1],
                decode_keys=sum(keys for keys, _ in counts[1:]),
                decode_equal=sum(equal for _, equal in counts[1:]),
                forwards=len(tokens),
                equal_tokens=sum(mine == theirs for mine, theirs in zip(tokens, other[name][1], strict=True)),
            )
        )
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What float32 was asked for and did not give."""
    wanted = {"device_map": 1.0, "tp_plan": NEAR_TIES}
    return [
        f"{row['placement']}, {row['method']}, {moment}: {row[f'{moment}_equal']} of {row[f'{moment}_keys']} keys"
        for row in rows
        for moment in ("prompt", "decode")
        if row["dtype"] == "float32" and row[f"{moment}_equal"] < wanted[row["placement"]] * row[f"{moment}_keys"]
    ]


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print(
        f"\n{'dtype':9} {'placement':11} {'method':24} {'after the prompt':>18} {'in decode':>20} {'next tokens':>12}"
    )
    for row in rows:
        counts = [f"{row[f'{moment}_equal']}/{row[f'{moment}_keys']}" for moment in ("prompt", "decode")]
        tokens = f"{row['equal_tokens']}/{row['forwards']}"
        line = f"{row['dtype']:9} {row['placement']:11} {row['method']:24} {counts[0]:>18} {counts[1]:>20} {tokens:>12}"
        print(line)


def check(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Save the model, load it in each way, and compare."""
    # transformers 5.17 divides no odd vocabulary.
    shape = TINY | {"vocab_size": 260} if arguments.shape == "tiny" else SHAPES[arguments.shape]
    started = time.perf_counter()
    save_sharp_model(shape, folder)
    free_memory()
    print(f"{arguments.shape} saved in {time.perf_counter() - started:.0f} s", flush=True)
    on_gpu = torch.cuda.is_available()
    alone, mapped = {}, {}
    for dtype in arguments.dtypes:
        alone[dtype], _ = run(folder, dtype, arguments, device="cuda:0" if on_gpu else "cpu")
        free_memory()
        mapped[dtype] = run(folder, dtype, arguments, device_map="balanced" if on_gpu else "auto")
        free_memory()
    n_ranks = torch.cuda.device_count() if on_gpu else 2
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    options = [f"--tokens={arguments.tokens}", f"--budget={arguments.budget}", f"--steps={arguments.steps}"]
    command = [sys.executable, *launcher, __file__, *options, "--dtypes", *arguments.dtypes, "--as-rank", str(folder)]
    subprocess.run(command, check=True, timeout=600)
    n_seen = arguments.tokens + arguments.steps
    common = dict(shape=arguments.shape, prompt_tokens=arguments.tokens, budget=arguments.budget)
    common |= dict(decode_steps=arguments.steps) | stamp(arguments.commit)
    rows = []
    for dtype in arguments.dtypes:
        parts = [torch.load(folder / f"{dtype}-rank{rank}.pt") for rank in range(n_ranks)]
        spread, n_devices = mapped[dtype]
        for placement, devices, results in (("device_map", n_devices, spread), ("tp_plan", n_ranks, all_heads(parts))):
            where = dict(dtype=dtype, placement=placement, devices=devices)
            rows += [common | where | row for row in compare(alone[dtype], results, n_seen)]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="qwen2.5-7b")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--budget", type=int, default=256, help="tokens per layer and KV head")
    parser.add_argument("--steps", type=int, default=16, help="decode steps")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "spread" / "kept_keys.csv")
    parser.add_argument("--folder", type=Path, help="for the checkpoint; default: a temporary one, deleted at the end")
    parser.add_argument("--commit", help="for the rows, where this is no git checkout")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.as_rank is not None:
        run_as_rank(given.as_rank, given)
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = check(Path(folder), given)
    write_rows(given.csv, rows, COLUMNS)
    print_table(rows)
    missed = failures(rows)
    print("\nfloat32:", "as asked for" if not missed else "\n  ".join(["MISSED", *missed]))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
