"""One rank of a model under transformers' own tensor parallelism: what it keeps and answers, for every method.

Run by test_tensor_parallel.py: python tests/attention/one_rank.py FOLDER RANK, the folder holding `model` and getting
`rankN.pt`. Without torch's launcher: the ranks meet in a file.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cab_attention import CAB, AdaKV, EvictingCache, KeyDiff, KeyNorm, Method, PyramidKV, SharedPrefill
from cab_attention.attention import load_model_with_attention
from tests.all_methods import FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.feeding import feed, left_padded

N_RANKS, BUDGET = 2, 12
SETS: dict[str, Any] = {
    "cab_layer": lambda b: CAB(b, block_size=4, granularity="layer"),
    "cab_redundancy_model": lambda b: CAB(b, block_size=4, bridge="redundancy", granularity="model"),
    "key_diff_layer": lambda b: KeyDiff(b, granularity="layer"),
    "key_norm_model": lambda b: KeyNorm(b, granularity="model"),
    "pyramidkv_layer": lambda b: PyramidKV(b, window=8, beta=3, granularity="layer"),
    "adakv_fraction": lambda b: AdaKV(0.4, window=8),
}
MAKES = METHODS | VARIANTS | FULL_ATTENTION_VARIANTS | SETS
FEW = ("random", "key_norm", "adakv", "tova", "cab_layer", "h2o_all_options")
SHARED = ("h2o", "adakv", "tova", "cab_model", "random")


def method(name: str) -> Method:
    return MAKES[name](BUDGET)


@torch.inference_mode()
def kept_and_answered(model: PreTrainedModel) -> dict[str, tuple[list[list[torch.Tensor]], torch.Tensor]]:
    """By run: each forward's positions [B, G here, kept] of every layer, and the logits [B, forwards, V].

    Every method on Llama, a few on other models.
    """
    ids, mask = left_padded(0, 6, n_tokens=48)
    forwards = [(0, 42), *((n, n + 1) for n in range(42, 48))]

    def run(cache: EvictingCache, forwards: list[tuple[int, int]]) -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        logits, kept = [], []
        for start, stop in forwards:
            logits.append(feed(model, cache, ids[:, start:stop], mask[:, :stop])[:, -1:])
            kept.append([layer.positions.clone() for layer in cache.layers])
        return kept, torch.cat(logits, dim=1)

    names = list(MAKES) if model.config.model_type == "llama" else FEW
    results = {name: run(EvictingCache(model.config, method(name)), forwards) for name in names}
    if names is FEW:
        return results
    after_context = dict(prompt_tokens=42, compress_at=30)
    for name in ("adakv", "tova", "cab_layer"):
        cache = EvictingCache(model.config, method(name), **after_context)
        results[f"{name} after context"] = run(cache, [(0, 30), (30, 42), *forwards[1:]])
    caches = {name: EvictingCache(model.config, method(name)) for name in SHARED}
    feed(model, SharedPrefill([*caches.values()]), ids[:, :42], mask[:, :42])
    results |= {f"{name} shared": run(cache, forwards[1:]) for name, cache in caches.items()}
    model.set_attn_implementation("eager_with_scores")
    results["tova eager"] = run(EvictingCache(model.config, method("tova")), forwards)
    return results


def main(folder: Path, rank: int) -> None:
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=N_RANKS)
    results: Mapping[str, Any] = {
        path.name: kept_and_answered(
            load_model_with_attention(
                str(path), "cab", distributed_config=DistributedConfig(tp_plan="auto", tp_size=N_RANKS)
            )
        )
        for path in sorted((folder / "models").iterdir())
    }
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
