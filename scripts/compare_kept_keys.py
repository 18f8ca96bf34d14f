"""Does H2O keep the same keys on `attention=cab` as on eager attention? Measured on real prompts, layer by layer.

    python scripts/compare_kept_keys.py --prompts hotpotqa.jsonl      # writes results/kernels/kept_keys.csv

The model is no trained one: it is of Llama's type with random weights, made sharp (`sharp_model`); rows `sharpness` say
how sharp. Prompts are the bytes of context and question, with the middle cut out of those that are too long. Kept keys
are those of H2O, per KV head; the recent half of its budget is the same on any attention.

Rows of the CSV, by `part`; `kept_share` is the share of the keys kept on `against` that are kept here too.
    sharpness   of a query's softmax the largest weight and the entropy (nats), standard deviation of the logits: means
    layer       q, k, v of every layer of one float32 forward, rounded to `dtype`; against float64 on the same q and k,
                with the relative error of the scores over all keys; and cab in float32 against eager in float32
    model       whole prefills with EvictingCache, where the hidden states differ too
    generate    greedy tokens of cab, EvictingCache and budget full that equal those of sdpa and the default cache
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

# The library of this checkout, installed or not.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_records import RESULTS, STAMP, stamp, write_rows
from sharp_model import BOS, sharp_model
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from cab_attention import H2O, EvictingCache, FlashAttentionWithAccumulation, flash_attention_with_cumulative_scores
from cab_attention.cut import slots_to_keep
from cab_attention.kernels.dispatch import last_choice
from cab_attention.methods.base import CachedKeys
from cab_attention.transformers_attention import cab_attention_forward, eager_with_scores_forward, padding_mask

WHERE = ("prompts", "prompt", "tokens", "budget", "heads", "kv_heads", "head_dim", "layer")
WHAT = ("part", "attention", "dtype", "against", "kernel")
FIGURES = ("kept_share", "max_error", "rms_error", "largest_weight", "entropy", "logit_std", "equal_tokens")
COLUMNS = (*WHERE, *WHAT, *FIGURES, *STAMP)
Row = dict[str, Any]
NEW_TOKENS = 32
FLOAT32_SHARE = 0.999  # what the project claims
TRUTH = "float64 of the same q and k"
VIEWS: dict[str, tuple[str, Row]] = {  # title: the figure, and which rows
    "largest weight": ("largest_weight", dict(part="sharpness")),
    "entropy": ("entropy", dict(part="sharpness")),
    "f32 cab/eager": ("kept_share", dict(part="layer", dtype="float32", against="eager float32")),
    "b16 cab": ("kept_share", dict(part="layer", attention="cab", dtype="bfloat16")),
    "b16 eager": ("kept_share", dict(part="layer", attention="eager", dtype="bfloat16")),
    "rms cab": ("rms_error", dict(part="layer", attention="cab", dtype="bfloat16")),
    "rms eager": ("rms_error", dict(part="layer", attention="eager", dtype="bfloat16")),
    "model f32 cab/eager": ("kept_share", dict(part="model", dtype="float32")),
    "model b16 cab": ("kept_share", dict(part="model", attention="cab", dtype="bfloat16", against="eager float32")),
    "model b16 eager": ("kept_share", dict(part="model", attention="eager", dtype="bfloat16")),
}


def read_prompts(path: Path, n_rows: int, max_tokens: int, budget: int) -> list[list[int]]:
    """Token ids of the first rows; raises ValueError for what cannot be used."""
    if min(n_rows, budget) < 1 or max_tokens < 4:
        raise ValueError(f"rows={n_rows}, budget={budget}, max_tokens={max_tokens}: allowed are >= 1, >= 1, >= 4")
    if not path.is_file():
        raise ValueError(f"--prompts {path} does not exist; it should be a LongBench NAME.jsonl")
    prompts: list[list[int]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if len(prompts) == n_rows:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = f"{row['context']}\n\n{row['input']}"
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with `context` and `input`: {error!r}") from None
        ids, half = list(text.encode(errors="replace")), (max_tokens - 1) // 2
        prompts.append([BOS, *(ids if len(ids) < max_tokens else ids[:half] + ids[half + 1 - max_tokens :])])
        if (n := len(prompts[-1])) <= budget:
            raise ValueError(f"budget={budget}: the prompt of line {number} has {n} tokens, nothing would be evicted")
    if not prompts:
        raise ValueError(f"{path} holds no rows")
    return prompts


def cab_scores(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B, G, N] of the operator."""
    return flash_attention_with_cumulative_scores(q, k, v, scale=module.scaling, is_causal=True, per_kv_head=True)[1]


def eager_scores(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores [B, G, N] of what transformers calls as `eager_with_scores`."""
    recorder = FlashAttentionWithAccumulation()
    eager_with_scores_forward(module, q, k, v, None, scaling=module.scaling, score_recorder=recorder)
    scores = recorder.get_cumulative_scores()
    assert scores is not None
    return scores.unflatten(1, (k.shape[1], -1)).sum(2)


SCORES: dict[str, Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]] = {"cab": cab_scores, "eager": eager_scores}


def exact_scores(module: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Row]:
    """Scores [B, G, N] in float64 from q [B, H, N, D] and k [B, G, N, D], and how sharp the attention is."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    scores, sharpness = [], []
    for queries, keys in zip(q.chunk(k.shape[1], 1), k.split(1, 1), strict=True):  # a KV head at a time: N x N is large
        logits = queries.double() @ keys.double().mT * module.scaling
        spread = logits[..., ~future].std(-1).mean()
        weights = logits.masked_fill_(future, -torch.inf).softmax(-1)
        scores.append(weights.sum((1, 2)))
        entropy = torch.special.entr(weights).sum(-1).mean()
        sharpness.append(torch.stack([weights.amax(-1).mean(), entropy, spread]))
    means = torch.stack(sharpness).mean(0).tolist()
    return torch.stack(scores, 1), dict(zip(("largest_weight", "entropy", "logit_std"), means, strict=True))


def kept_keys(scores: Tensor, keys: Tensor, budget: int) -> Tensor:
    """Positions [B, G, budget] that H2O keeps by these scores [B, G, N]."""
    positions = torch.arange(scores.shape[2], device=scores.device).expand(scores.shape)
    tokens = torch.tensor([[[budget]]], device=scores.device)
    return slots_to_keep(H2O(budget), [CachedKeys(keys, keys, positions, scores, tokens)], budget)


def kept_share(kept: Tensor, reference: Tensor) -> float:
    """Share of the kept positions [B, G, K] of `reference` that are also in `kept`, KV head by KV head."""
    return (reference[..., :, None] == kept[..., None, :]).any(-1).double().mean().item()


def compare_layers(model: PreTrainedModel, ids: Tensor, budget: int) -> list[Row]:
    """Every layer by itself: one forward in float32 gives q, k and v, so that nothing drifts."""
    recorded: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []

    def record(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> tuple[Tensor, None]:
        recorded.append((module, q, k, v))
        return cab_attention_forward(module, q, k, v, *args, **options)

    AttentionInterface.register("cab_recorded", record)
    AttentionMaskInterface.register("cab_recorded", padding_mask)
    model.set_attn_implementation("cab_recorded")
    model(ids, use_cache=False, logits_to_keep=1)
    rows: list[Row] = []
    for layer, (module, *qkv) in enumerate(recorded):
        kept: dict[str, Tensor] = {}
        for dtype in ("float32", "bfloat16"):
            q, k, v = (x.to(getattr(torch, dtype)) for x in qkv)
            exact, sharpness = exact_scores(module, q, k)
            truth = kept_keys(exact, k, budget)
            if dtype == "float32":
                rows.append(dict(part="sharpness", layer=layer, dtype=dtype) | sharpness)
            here = dict(part="layer", layer=layer, dtype=dtype)
            for attention, function in SCORES.items():
                scores = function(module, q, k, v)
                choice = last_choice() if attention == "cab" else None
                kernel = f"{choice.forward}, {choice.scores}" if choice else ""
                kept[attention] = kept_keys(scores, k, budget)
                error = (scores / exact - 1).abs()
                errors = dict(max_error=error.max().item(), rms_error=error.square().mean().sqrt().item())
                share = kept_share(kept[attention], truth)
                rows.append(here | errors | dict(attention=attention, against=TRUTH, kernel=kernel, kept_share=share))
            if dtype == "float32":
                share = kept_share(kept["cab"], kept["eager"])
                rows.append(here | dict(attention="cab", against="eager float32", kept_share=share))
    return rows


def compare_models(model: PreTrainedModel, ids: Tensor, budget: int) -> list[Row]:
    """Whole prefills: what is compared in a layer comes out of all the layers below."""
    kept: dict[tuple[str, str], list[Tensor]] = {}
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # not the buffers: RoPE's frequencies stay float32, as in a checkpoint
        parameter.data = parameter.data.bfloat16()
    for dtype, run in (("float32", model), ("bfloat16", rounded)):
        for attention, name in (("cab", "cab"), ("eager", "eager_with_scores")):
            run.set_attn_implementation(name)
            cache = EvictingCache(run.config, H2O(budget))
            run(ids, past_key_values=cache, logits_to_keep=1)
            kept[attention, dtype] = [layer.positions for layer in cache.layers]
    pairs = [(("cab", dtype), ("eager", dtype)) for dtype in ("float32", "bfloat16")]
    pairs += [((attention, "bfloat16"), ("eager", "float32")) for attention in SCORES]
    return [
        dict(part="model", layer=layer, attention=one[0], dtype=one[1], against=f"{other[0]} {other[1]}")
        | dict(kept_share=kept_share(*positions))
        for one, other in pairs
        for layer, positions in enumerate(zip(kept[one], kept[other], strict=True))
    ]


def compare_generation(model: PreTrainedModel, ids: Tensor) -> Row:
    """Greedy decoding with nothing evicted against transformers' own attention and cache."""
    tokens = []
    for attention in ("cab", "sdpa"):
        model.set_attn_implementation(attention)
        cache = dict(past_key_values=EvictingCache(model.config, H2O("full"))) if attention == "cab" else {}
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            **cache,
        )
        tokens.append(output[0, ids.shape[1] :])
    equal = int((tokens[0] == tokens[1]).sum())
    return dict(part="generate", attention="cab", dtype="float32", against="sdpa", budget="full", equal_tokens=equal)


def figures(rows: Sequence[Row], view: str, **more: Any) -> list[Any]:
    """The figures of a view, in the order of the rows."""
    figure, which = VIEWS[view]
    return [row[figure] for row in rows if all(row.get(key) == value for key, value in (which | more).items())]


def table(rows: Sequence[Row], n_layers: int, head_dim: int) -> str:
    """Means over the prompts, a line a layer."""
    lines = [f"head dim {head_dim}\nlayer" + "".join(f"{view:>{len(view) + 3}}" for view in VIEWS)]
    for layer in range(n_layers):
        means = {view: fmean(figures(rows, view, layer=layer, head_dim=head_dim)) for view in VIEWS}
        lines.append(f"{layer:5}" + "".join(f"{mean:{len(view) + 3}.4g}" for view, mean in means.items()))
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[tuple[bool | None, str]]:
    """(holds, in words) of every claim; None: no claim, only reported."""
    found: list[tuple[bool | None, str]] = []
    for view in ("f32 cab/eager", "model f32 cab/eager"):
        share, lowest = fmean(figures(rows, view)), min(figures(rows, view))
        words = f"{view}: {share:.6f} of eager's keys kept, claimed {FLOAT32_SHARE}; lowest of a layer {lowest:.6f}"
        found.append((share >= FLOAT32_SHARE, words))
    for prefix, claimed in (("", True), ("model ", False)):  # the whole model's hidden states are rounded as well
        ours, theirs = (figures(rows, f"{prefix}b16 {attention}") for attention in SCORES)
        closer = [cab >= eager for cab, eager in zip(ours, theirs, strict=True)]
        words = f"{prefix}b16: cab at least as close as eager in {sum(closer)} of {len(closer)} prompts and layers"
        words += f", mean share {fmean(ours):.6f} and {fmean(theirs):.6f}"
        found.append((all(closer) if claimed else None, words))
    equal = [row["equal_tokens"] for row in rows if row["part"] == "generate"]
    found.append((min(equal) == NEW_TOKENS, f"generate: {equal} of {NEW_TOKENS} greedy tokens are those of sdpa"))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a LongBench NAME.jsonl")
    parser.add_argument("--rows", type=int, default=3, help="the first rows of it")
    parser.add_argument("--budget", type=int, default=256, help="tokens per layer and KV head")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a prompt")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "kept_keys.csv")
    parser.add_argument("--commit", help="the commit that is measured, where there is no git checkout")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no NVIDIA GPU")
    if options.output.exists() and not options.output.read_text().startswith(",".join(COLUMNS) + "\n"):
        parser.error(f"--output {options.output} is another kind of file: it would be overwritten")
    try:
        prompts = read_prompts(options.prompts, options.rows, options.max_tokens, options.budget)
    except ValueError as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("highest")
    made_with, rows = stamp(options.commit), []
    for head_dim in options.head_dim:
        model = sharp_model(options.layers, head_dim, options.device)
        heads = dict(heads=model.config.num_attention_heads, kv_heads=model.config.num_key_value_heads)
        for index, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=options.device)
            with torch.no_grad():
                found = compare_layers(model, ids, options.budget) + compare_models(model, ids, options.budget)
                found.append(compare_generation(model, ids))
            where = dict(prompts=options.prompts.name, prompt=index, tokens=len(prompt), budget=options.budget)
            rows += [where | heads | dict(head_dim=head_dim) | row | made_with for row in found]
        print(table(rows, options.layers, head_dim), flush=True)
    rounded = [{name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    write_rows(options.output, rounded, COLUMNS)
    results = verdicts(rows)
    for holds, words in results:
        print(f"{ {True: 'holds', False: 'FAILS', None: 'reported'}[holds] }: {words}")
    print(options.output)
    return 1 if any(holds is False for holds, _ in results) else 0


if __name__ == "__main__":
    sys.exit(main())
