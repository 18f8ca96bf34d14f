"""Prefill of a 7B-shaped model with random weights, evicting or not: time, and peak memory over the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_checks import Shape
from kernel_comparison import Comparison, WrongResultError, why_not
from kernel_timing import Percentiles, free, percentiles
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from cab_attention import H2O, EvictingCache
from experiments.longbench_qa.memory import MemoryMeter
from experiments.longbench_qa.shapes import SHAPES

MODEL = "qwen2.5-7b"
BUDGET = 1024  # tokens
LENGTHS = (3000, 8192, 32768, 131072)  # tokens
LONG = 100_000  # from here on measured once: the warm-up is a short prompt
REPEATS = 3
# Rounding through all layers in bfloat16; attention that is wrong in a layer gives other logits altogether.
LOGITS_ERROR = 0.1


@dataclass(frozen=True)
class Prefill:
    """An attention implementation of transformers and the cache that goes with it."""

    attention: str
    cache: Callable[[PreTrainedModel], Cache | None]
    note: str


def _h2o(model: PreTrainedModel) -> Cache:
    return EvictingCache(model.config, H2O(BUDGET))


REFERENCE = "sdpa_full"
PREFILLS = {  # the reference first
    REFERENCE: Prefill("sdpa", lambda model: None, "the model's own cache, nothing evicted"),
    "cab_h2o": Prefill("cab", _h2o, f"EvictingCache, H2O at {BUDGET} tokens"),
    "eager_h2o": Prefill("eager_with_scores", _h2o, f"EvictingCache, H2O at {BUDGET} tokens"),
}


def build_model(shape: dict[str, Any], device: str) -> PreTrainedModel:
    """A model of this shape with random weights, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    return model.eval()


def measure_prefills(comparison: Comparison, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Add time and peak memory of every prefill at every length; lengths ascend."""
    model = build_model(SHAPES[MODEL], comparison.device)
    right: Tensor | None = None
    for provider, prefill in PREFILLS.items():
        model.set_attn_implementation(prefill.attention)
        failed = ""  # at a shorter length
        for n_tokens in lengths:
            numbers, note = None, prefill.note
            if failed:
                note = f"not tried: {failed}"
            else:
                try:
                    if n_tokens == lengths[0]:
                        logits = _logits(model, prefill, n_tokens)
                        right = logits if provider == REFERENCE else right
                        check_logits(logits, right)
                    numbers = _measure(model, prefill, n_tokens)
                except Exception as error:  # on record, and the others go on
                    note = why_not(error)
                    failed = f"{note} at {n_tokens} tokens already"
                free()
            _add(comparison, model, provider, n_tokens, numbers, note)


def check_logits(logits: Tensor, right: Tensor | None) -> None:
    """Raise WrongResultError if logits [1, 1, vocabulary] differ from the right ones by more than rounding."""
    if right is None:
        raise WrongResultError(f"there are no logits of {REFERENCE} to compare with")
    error = ((logits - right).norm() / right.norm()).item()
    if not error <= LOGITS_ERROR:
        raise WrongResultError(f"relative error of the logits to {REFERENCE}'s {error:.2g}, allowed {LOGITS_ERROR}")


def _prompt(model: PreTrainedModel, n_tokens: int) -> Tensor:
    generator = torch.Generator(model.device).manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (1, n_tokens), generator=generator, device=model.device)


def _forward(model: PreTrainedModel, prefill: Prefill, ids: Tensor) -> tuple[Tensor, Cache]:
    """One prefill as `generate` does it: logits of the last token alone, and the cache."""
    output = model(ids, past_key_values=prefill.cache(model), use_cache=True, logits_to_keep=1)
    return output.logits, output.past_key_values


def _logits(model: PreTrainedModel, prefill: Prefill, n_tokens: int) -> Tensor:
    """float32 logits of the last token, after a check that what should be evicted was."""
    logits, cache = _forward(model, prefill, _prompt(model, n_tokens))
    if isinstance(cache, EvictingCache):
        cache.check_saw(n_tokens)
    kept = {layer.keys.shape[2] for layer in cache.layers}  # type: ignore[union-attr]
    wanted = min(BUDGET, n_tokens) if isinstance(cache, EvictingCache) else n_tokens
    if kept != {wanted}:
        raise WrongResultError(f"the layers keep {sorted(kept)} tokens instead of {wanted}")
    return logits.float()


def _measure(model: PreTrainedModel, prefill: Prefill, n_tokens: int) -> tuple[Percentiles, float | None]:
    """(ms, peak MiB over the weights or None on a CPU), after a warm-up."""
    ids = _prompt(model, n_tokens)
    _forward(model, prefill, ids if n_tokens < LONG else ids[:, : LENGTHS[0]])
    free()
    meter = MemoryMeter(model.device)
    measured = []
    for _ in range(REPEATS if n_tokens < LONG else 1):
        started = meter.start()
        _forward(model, prefill, ids)
        measured.append(meter.stop(started))
    peaks = [peak for _, peak in measured if peak is not None]
    return percentiles([ms for ms, _ in measured]), max(peaks) / 2**20 if peaks else None


def _add(
    comparison: Comparison,
    model: PreTrainedModel,
    provider: str,
    n_tokens: int,
    numbers: tuple[Percentiles, float | None] | None,
    note: str,
) -> None:
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    shape = Shape(n_tokens, n_tokens, 1, heads, kv_heads, config.hidden_size // heads)
    ms, mib = (None, None) if numbers is None else numbers
    comparison.add(provider, "prefill_time", "ms", ms, shape, "call", note)
    if mib is not None or numbers is None:
        peak = None if mib is None else Percentiles(mib)
        comparison.add(provider, "peak_over_weights", "MiB", peak, shape, "call", note)
