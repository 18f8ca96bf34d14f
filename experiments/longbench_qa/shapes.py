"""Model shapes that are built without a checkpoint, as arguments of transformers' configs."""

from typing import Any

# Random weights of this width give sharp attention; at the usual 0.02 it is nearly uniform.
TINY = dict(
    model_type="llama",
    vocab_size=259,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    initializer_range=0.15,
)
LARGE = dict(num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": dict(
        model_type="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama-3.1-8b": dict(
        model_type="llama",
        vocab_size=128256,
        intermediate_size=14336,
        num_hidden_layers=32,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        **LARGE,
    ),
    "mistral-7b": dict(
        model_type="mistral",
        vocab_size=32768,
        intermediate_size=14336,
        num_hidden_layers=32,
        max_position_embeddings=131072,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **LARGE,
    ),
    "qwen3-8b": dict(
        model_type="qwen3",
        vocab_size=151936,
        intermediate_size=12288,
        num_hidden_layers=36,
        head_dim=128,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **LARGE,
    ),
}
