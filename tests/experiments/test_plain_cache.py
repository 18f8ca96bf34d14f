"""The full cache on transformers' own sdpa attention: the answers and the records of the full cache on `cab`."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from cab_attention import H2O, Full
from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.plain_cache import PlainCache
from tests.experiments.cells import MODEL, demo_cell, recorded

COST = ("prefill_ms", "decode_ms_per_token", "bookkeeping_bytes")


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL)


@pytest.mark.parametrize(
    "changes", [{}, {"compress": "after_context"}, {"first_token": "compressed"}, {"prefill_chunk": 64}]
)
def test_the_records_are_those_of_cab(tmp_path: Path, model: ModelWrapper, changes: dict):
    cells = [demo_cell(tmp_path, method=Full(), attention=attention, **changes) for attention in ("cab", "sdpa")]
    metrics = [run_cell(cell, model) for cell in cells]
    assert [found["model"]["attention"] for found in metrics] == ["cab", "sdpa"]
    ours, plain = ([{k: v for k, v in line.items() if k not in COST} for line in recorded(cell)] for cell in cells)
    assert ours == plain
    assert {line["bookkeeping_bytes"] for line in recorded(cells[1])} == {0}
    assert {line["kept_tokens"] for line in plain} == {line["compressed_tokens"] for line in plain}


def test_a_method_that_evicts_is_refused(model: ModelWrapper):
    with pytest.raises(ValueError, match=r"^attention=sdpa gives no cache to cut: h2o needs cab or eager$"):
        model.load("sdpa").generate("some text", H2O(4), max_new_tokens=2)


def test_positions_of_layers_with_a_sliding_window():
    config = MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    cache = PlainCache(model.config, Full())
    for ids in (torch.arange(9)[None], torch.tensor([[9]])):
        model(ids, past_key_values=cache)
    for positions in cache.kept_positions():
        assert positions.shape == (1, 2, 4)  # what the next query still sees beside itself
        assert positions[0, 0].tolist() == [6, 7, 8, 9]
    assert cache.cache_bytes == 2 * 2 * 2 * 4 * 8 * 4
    cache.check_saw(10)
    with pytest.raises(RuntimeError, match="saw 10 tokens of 11"):
        cache.check_saw(11)


def test_the_identity_says_it(tmp_path: Path):
    cell = demo_cell(tmp_path, method=Full(), attention="sdpa")
    assert cell.identity()["attention"] == asdict(cell)["attention"] == "sdpa"
    assert cell.folder != replace(cell, attention="cab").folder
