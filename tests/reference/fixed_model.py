"""A tiny Llama with the same weights under every version of transformers and torch, and a text for it."""

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

N_TOKENS = 61


def fixed_model(attention: str) -> LlamaForCausalLM:
    """A float32 model in eval mode with three query heads to a KV head.

    Weights are drawn by name from numpy's RandomState, whose stream is frozen, so that the order in which a version
    initialises parameters does not matter. They are wide, so that attention is sharp.
    """
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    model, random = LlamaForCausalLM(config).eval(), np.random.RandomState(0)
    for name, parameter in sorted(model.named_parameters()):
        draws = random.standard_normal(tuple(parameter.shape)) * 0.15
        parameter.data = torch.tensor(draws + (1 if "norm" in name else 0), dtype=torch.float32)
    return model


def fixed_ids() -> torch.Tensor:
    """Token ids [1, N_TOKENS]."""
    return torch.tensor(np.random.RandomState(1).randint(3, 96, (1, N_TOKENS)))
