"""A model with random weights whose attention is about as concentrated as a trained model's."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

BOS = 256  # after the 256 bytes


def sharp_model(n_layers: int, head_dim: int, device: str) -> PreTrainedModel:
    """A Llama-type model of 16 heads and 4 KV heads in float32; the same random weights on every machine.

    Query heads are 1.5, 3, 4.5 and 6 times as sharp as unit-variance q and k, one of each to a KV head. A bias of the
    queries, in the slow dimensions of RoPE, makes some keys popular with all queries, and the first token a sink of the
    sharp heads. Tokens have embeddings of their own; layers write little to the residual stream, as GPT-2's at first.
    """
    width, heads, kv_heads = 1024, 16, 4
    config = LlamaConfig(
        vocab_size=BOS + 1,
        hidden_size=width,
        intermediate_size=2816,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        attention_bias=True,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        initializer_range=width**-0.5,  # a unit-variance input gives a unit-variance output
        bos_token_id=BOS,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="cab", dtype=torch.float32)
        embeddings = model.model.embed_tokens.weight.mul_(width**0.5)
        embeddings[BOS] *= 8  # so that no layer turns it much
        bos = embeddings[BOS] / embeddings[BOS].norm() * width**-0.5
        gain = torch.tensor([1.5, 3.0, 4.5, 6.0]).repeat(heads // 4).repeat_interleave(head_dim)
        for layer in model.model.layers:
            slow = torch.zeros(kv_heads, head_dim // 2)
            slow[:, -(head_dim // 8) :] = torch.randn(kv_heads, head_dim // 8)
            slow = nn.functional.normalize(slow.repeat(1, 2), dim=-1)  # RoPE pairs i with i + D / 2
            attention = layer.self_attn
            attention.q_proj.bias.copy_(slow.repeat_interleave(heads // kv_heads, 0).flatten() * head_dim**0.5 / 2)
            attention.q_proj.weight.mul_(gain[:, None])
            attention.q_proj.bias.mul_(gain)
            attention.k_proj.weight.add_(8 * torch.outer(slow.flatten(), bos))  # a sink's logit is 4 times the gain
            for output in (attention.o_proj, layer.mlp.down_proj):
                output.weight.mul_((2 * n_layers) ** -0.5)
    model.generation_config.eos_token_id = None  # never stop early
    return model.eval().to(device)
