"""Memory of attention and of a KV cache, computed from shapes: what it counts, in bytes."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

# Bytes that eager attention holds at its peak per query head, query and key (logits, mask, softmax in float32 and its
# cast) by the model's element size. Measured on an H200 at 4k tokens: 11.9 in bfloat16 (7B shape), 13.6 in float32.
EAGER_BYTES = {2: 12, 4: 14}


def attention_bytes(
    implementation: str, *, heads: int, head_dim: int, n_queries: int, n_keys: int, itemsize: int
) -> int:
    """What attention of one sequence in one layer holds beyond its queries, keys and values, without scratch space.

    Eager (`eager`, `eager_with_scores`): the matrices heads x queries x keys, 12 bytes an entry in half precision, 14
    in float32. Others: the output and a float32 log-sum-exp a row, and for `cab` a float32 score a query head and key.
    """
    if implementation in ("eager", "eager_with_scores"):
        return heads * n_queries * n_keys * EAGER_BYTES.get(itemsize, 14)
    rows = heads * n_queries * (head_dim * itemsize + 4)
    return rows + (heads * n_keys * 4 if implementation == "cab" else 0)


def prefill_attention_bytes(implementation: str, config: PreTrainedConfig, n_tokens: int, itemsize: int) -> int:
    """`attention_bytes` of a prompt in one layer of the model."""
    config = config.get_text_config(decoder=True)
    shape = dict(heads=config.num_attention_heads, head_dim=_head_dim(config), n_queries=n_tokens, n_keys=n_tokens)
    return attention_bytes(implementation, **shape, itemsize=itemsize)


def full_cache_bytes(cache: Cache, n_tokens: int) -> int:
    """Keys and values of `n_tokens` of one sequence in all layers if nothing is evicted, from a cache that was fed.

    A layer with a sliding window of w holds the last w - 1 tokens.
    """
    total = 0
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None)
        held = n_tokens if window is None else min(n_tokens, window - 1)
        total += held * sum(x.shape[1] * x.shape[3] * x.element_size() for x in (layer.keys, layer.values))
    return total


@torch.no_grad()
def model_cache_bytes(model: PreTrainedModel, n_tokens: int) -> int:
    """`full_cache_bytes` of a model; one token is fed to learn the shapes."""
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache, use_cache=True)
    return full_cache_bytes(cache, n_tokens)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
