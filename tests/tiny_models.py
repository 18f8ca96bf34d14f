"""Tiny models of the supported architectures, made from a config with a fixed seed: no download."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
# An initialisation this wide gives sharp attention: with the usual 0.02 it is nearly uniform and tests are weak.
SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": 24}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "final_logit_softcapping": None}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "phi3": (Phi3Config, {"original_max_position_embeddings": 512}),
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "resid_pdrop": 0.0}),
}


def tiny_model(architecture: str, attention: str = "cab", **changes: object) -> PreTrainedModel:
    """A float32 model in eval mode; the same weights for the same architecture and changes."""
    config_class, own = ARCHITECTURES[architecture]
    config = config_class(**{**SHARED, **own, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # never stop early
    return model.eval()


def random_ids(n_batch: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Token ids [B, N] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_batch, n_tokens), generator=generator)
