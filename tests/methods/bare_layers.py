"""An EvictingCache's layers, fed queries and keys directly and compared with brute force after every step."""

import numpy as np
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from cab_attention import EvictingCache, Method
from cab_attention.cache_layer import EvictingLayer
from cab_attention.kernels.flash_attention_accumulate import flash_attention_with_cumulative_scores
from tests.methods.brute_force import BruteForceModel
from tests.methods.numpy_rules import rope

N_PROMPT, N_STEPS, DIM, SCALE = 37, 7, 8, 0.5
# Says how keys are rotated; RoPE theta is 10 000.
ATTENTION = LlamaAttention(LlamaConfig(hidden_size=DIM, num_attention_heads=1, head_dim=DIM), 0)


def layers_of(method: Method, n_layers: int = 1, sliding_window: int | None = None, **prompt) -> list[EvictingLayer]:
    """`prompt`: an EvictingCache's `prompt_tokens` and `compress_at`."""
    options = dict(num_hidden_layers=n_layers, attn_implementation="cab")
    config = MistralConfig(sliding_window=sliding_window, **options) if sliding_window else LlamaConfig(**options)
    return EvictingCache(config, method, **prompt).layers


def forward(layers: list[EvictingLayer], q, k, v) -> list[list[list[int]]]:
    """Feed numpy queries [L, H, n, D], keys and values [L, G, n, D]; the kept positions by layer and head."""
    for layer, *states in zip(layers, q, k, v, strict=True):
        query, key, value = (torch.tensor(x, dtype=torch.float32)[None] for x in states)
        layer.update(key, value)
        options = {} if layer.sliding_window is None else {"sliding_window": layer.sliding_window}
        operator = flash_attention_with_cumulative_scores
        layer.attend(ATTENTION, operator, query, None, scale=SCALE, is_causal=True, **options)
    return [[[p for p in head if p >= 0] for head in layer.positions[0].tolist()] for layer in layers]


def random_steps(n_heads=4, n_kv_heads=2, prompt=(N_PROMPT,), n_steps=N_STEPS, seed=0, n_layers=1):
    """The prompt in pieces, then single tokens: queries, which have a mean before RoPE, keys and values."""
    random, seen = np.random.default_rng(seed), 0
    means = random.normal(size=(n_layers, n_heads, 1, DIM))
    for n in [*prompt, *[1] * n_steps]:
        q, k, v = (random.normal(size=(n_layers, heads, n, DIM)) for heads in (n_heads, n_kv_heads, n_kv_heads))
        q = rope(means + 1.5 * q, np.arange(seen, seen + n))
        seen += n
        yield tuple(x.astype(np.float32) for x in (q, k, v))


def assert_kept_as_brute_force(
    method: Method, steps, sliding_window: int | None = None, first_compared: int = 0, **prompt
) -> None:
    layers = brute_force = None
    for step, states in enumerate(steps):
        if layers is None:
            n_layers, n_kv_heads = states[1].shape[:2]
            layers = layers_of(method, n_layers, sliding_window, **prompt)
            brute_force = BruteForceModel(method, n_layers, n_kv_heads, sliding_window, **prompt)
        brute_force.forward(*(x.astype(np.float64) for x in states), SCALE)
        kept = forward(layers, *states)
        assert step < first_compared or kept == brute_force.present, f"after step {step}"
