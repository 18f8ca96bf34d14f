"""transformers' tensor parallelism on two CPU processes: kept keys and answers are one process's, for every method."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import is_accelerate_available

from cab_attention.attention import load_model_with_attention
from tests.attention import one_rank
from tests.feeding import tiny_model_with_key_gains

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_accelerate_available(), reason="transformers' tensor parallelism needs accelerate"),
]
# Phi-3's plan leaves attention whole on every rank; tied weights are one tensor that two rules divide.
MODELS = {
    "llama": dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
    "qwen2": dict(num_attention_heads=12, num_key_value_heads=4, hidden_size=96, tie_word_embeddings=True),
    "qwen3": dict(num_attention_heads=4, num_key_value_heads=2),
    "phi3": dict(num_attention_heads=4, num_key_value_heads=2),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One process's results, and those of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, changes in MODELS.items():
        tiny_model_with_key_gains(name, **changes).save_pretrained(folder / "models" / name)
    command = [sys.executable, str(Path(one_rank.__file__)), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(one_rank.N_RANKS)}
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment | {"LOCAL_RANK": str(rank), "RANK": str(rank)})
        for rank in range(one_rank.N_RANKS)
    ]
    alone = {}
    for name in MODELS:
        model = load_model_with_attention(str(folder / "models" / name), "cab", device="cpu")
        alone[name] = one_rank.kept_and_answered(model)
    assert [rank.wait(timeout=300) for rank in ranks] == [0] * one_rank.N_RANKS
    return alone, [torch.load(folder / f"rank{rank}.pt") for rank in range(one_rank.N_RANKS)]


@pytest.mark.parametrize("model", MODELS)
def test_kept_keys_and_answers_are_those_of_one_process(results, model):
    alone, ranks = results
    for run, (kept, logits) in alone[model].items():
        parts = [rank[model][run] for rank in ranks]
        for step, layers in enumerate(kept):
            for layer, positions in enumerate(layers):
                of_ranks = [part[0][step][layer] for part in parts]
                if model == "phi3":
                    whole = of_ranks[0]
                    assert all(torch.equal(whole, other) for other in of_ranks)
                else:
                    whole = torch.cat(of_ranks, dim=1)
                assert torch.equal(whole, positions), (run, step, layer)
        for _, logits_of_rank in parts:
            assert torch.equal(logits_of_rank, parts[0][1]), run  # ranks that differ would answer differently
            assert (logits_of_rank - logits).abs().max() < 1e-4, run
            assert torch.equal(logits_of_rank.argmax(-1), logits.argmax(-1)), run
