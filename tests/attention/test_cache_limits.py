"""What EvictingCache refuses, pins or frees, beyond the usual run of a generation."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PhimoeConfig, Qwen2MoeConfig

from cab_attention import CAB, H2O, EvictingCache, Full, Random, SnapKV, load_model_with_attention
from cab_attention.curvature import BlockGraph, block_log_weights
from tests.all_methods import EVICTING, METHODS
from tests.tiny_models import SHARED, random_ids, tiny_model

N_CONTEXT, N_PROMPT = 30, 42


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("name", EVICTING)
def test_what_follows_the_compressed_context_stays_through_decode(name: str, architecture: str):
    model, budget = tiny_model(architecture), 8
    cache = EvictingCache(model.config, METHODS[name](budget), prompt_tokens=N_PROMPT, compress_at=N_CONTEXT)
    ids = random_ids(2, N_PROMPT)
    with torch.inference_mode():
        model(ids[:, :N_CONTEXT], past_key_values=cache)
        token = model(ids[:, N_CONTEXT:], past_key_values=cache).logits[:, -1:].argmax(-1)
        for step in range(1, 6):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            for layer in cache.layers:
                window = layer.sliding_window or 10**6
                seen = N_PROMPT + step
                rest = range(max(N_CONTEXT, seen - window + 1), N_PROMPT)
                of_rest = (layer.positions >= rest.start) & (layer.positions < rest.stop)
                assert (of_rest.sum(-1) == len(rest)).all()
                others = ((layer.positions >= 0) & ~of_rest).sum(-1)
                if cache.method.evicts_in_decode:
                    assert (others <= budget).all()
                    if layer.sliding_window is None:
                        assert (others == budget).all()


def test_methods_rank_only_what_competes():
    """The question's own tokens take no part in H2O's recent window: that is the answer's last tokens."""
    model = tiny_model("llama")
    cache = EvictingCache(model.config, H2O(8), prompt_tokens=N_PROMPT, compress_at=N_CONTEXT)
    ids = random_ids(1, N_PROMPT)
    with torch.inference_mode():
        for part in (ids[:, :N_CONTEXT], ids[:, N_CONTEXT:], *[torch.tensor([[5]])] * 6):
            model(part, past_key_values=cache)
    for layer in cache.layers:
        assert (layer.positions[..., -4:] == torch.arange(N_PROMPT + 2, N_PROMPT + 6)).all()


@pytest.mark.parametrize("config_class", [PhimoeConfig, Qwen2MoeConfig])
@pytest.mark.parametrize("cached", [True, False])
def test_a_window_that_attention_is_not_told_of_is_refused(config_class, cached: bool):
    small = SHARED | {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}
    small |= {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
    model = AutoModelForCausalLM.from_config(config_class(**small), attn_implementation="cab").eval()
    options = {"past_key_values": EvictingCache(model.config, Full())} if cached else {}
    with torch.inference_mode(), pytest.raises(ValueError, match="sliding window"):
        model(random_ids(1, 40), **options)


@pytest.mark.parametrize("hidden", [slice(30, 40), slice(10, 12)])
def test_padding_that_is_not_on_the_left_is_refused(hidden: slice):
    model, mask = tiny_model("llama"), torch.ones(2, 40, dtype=torch.long)
    mask[1, hidden] = 0
    with torch.inference_mode(), pytest.raises(ValueError, match="left padding"):
        model(random_ids(2, 40), attention_mask=mask, past_key_values=EvictingCache(model.config, H2O(8)))


def test_padding_in_a_later_chunk_is_refused():
    model, mask = tiny_model("llama"), torch.ones(1, 40, dtype=torch.long)
    mask[0, 20:30] = 0
    cache = EvictingCache(model.config, H2O(8), prompt_tokens=40)
    ids = random_ids(1, 40)
    with torch.inference_mode():
        model(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
        with pytest.raises(ValueError, match="left padding"):
            model(ids[:, 20:], attention_mask=mask, past_key_values=cache)


def test_a_prompt_that_never_ends_is_found_out():
    model = tiny_model("llama")
    cache = EvictingCache(model.config, H2O(8), prompt_tokens=100)
    model.generate(random_ids(1, 40), past_key_values=cache, max_new_tokens=4, do_sample=False)
    with pytest.raises(RuntimeError, match="nothing was cut"):
        cache.check_saw(43)


def test_keys_of_any_length_have_four_neighbours():
    """A softmax over long keys rounds to 0 in float32: the graph must still know who is nearest."""
    representatives = 10 * torch.randn(1, 1, 24, 128, generator=torch.Generator().manual_seed(0))
    log_weights = block_log_weights(representatives, torch.ones(1, 1, 24, dtype=torch.bool))
    assert (log_weights.exp() == 0).float().mean() > 0.5
    assert BlockGraph.of(log_weights).adjacency.sum(-1).min() >= 4


def test_the_window_of_queries_is_let_go():
    model = tiny_model("llama")
    cache = EvictingCache(model.config, SnapKV(12, window=8), prompt_tokens=60)
    ids = random_ids(1, 60)
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache)
        waiting = cache.layers[0]._observation._recent_queries
        assert waiting.untyped_storage().nbytes() == waiting.nbytes == 4 * 8 * 16 * 4
        model(ids[:, 30:], past_key_values=cache)
    for layer in cache.layers:
        assert layer._observation._recent_queries is None
        assert layer.scores is None
        assert layer.positions.shape[-1] == 12


def test_sample_ids_of_a_batch_with_beams():
    model = tiny_model("llama")
    cache = EvictingCache(model.config, Random(8), sample_ids=["a", "b"])
    model.generate(random_ids(2, 30), past_key_values=cache, max_new_tokens=2, num_beams=3, do_sample=False)
    kept = cache.layers[0].positions[..., :8]
    alone = EvictingCache(model.config, Random(8), sample_ids="b")
    with torch.inference_mode():
        model(random_ids(2, 30)[1:], past_key_values=alone)
    assert all(torch.equal(row, alone.layers[0].positions[0]) for row in kept[3:])
    assert not torch.equal(kept[0], kept[3])


def test_a_model_without_the_registry_is_refused(tmp_path):
    from transformers import BloomConfig

    AutoModelForCausalLM.from_config(BloomConfig(vocab_size=96, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="Bloom"):
        load_model_with_attention(str(tmp_path), "cab", device="cpu")


@pytest.mark.parametrize("method", [H2O(8), CAB(8, block_size=4), CAB(8, bridge="median"), SnapKV(8, window=4)])
def test_a_step_compiles_to_one_graph(method):
    torch._dynamo.reset()
    model = tiny_model("llama", num_hidden_layers=1)
    ids, results = random_ids(1, 40), []
    for forward in (model, torch.compile(model, fullgraph=True, backend="eager")):
        cache = EvictingCache(model.config, method)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            results.append(forward(random_ids(1, 1), past_key_values=cache).logits)
    torch.testing.assert_close(*results)
