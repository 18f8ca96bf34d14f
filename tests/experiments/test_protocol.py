"""The protocol's axes in a cell: in its records, in its folder, and in what is measured."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cab_attention import H2O, TOVA
from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.schema import DatasetConfig
from tests.experiments.cells import MODEL, demo_cell, recorded

CHAT = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
AXES = {
    "compress": "after_context",
    "first_token": "compressed",
    "truncate": "left",
    "chat_template": "never",
    "prefill_chunk": 100,
}


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL).load()


@pytest.fixture
def chat_model() -> ModelWrapper:
    wrapper = ModelWrapper(MODEL).load()
    wrapper.loaded.tokenizer.chat_template = CHAT
    return wrapper


def without_times(cell: Cell) -> list[dict[str, Any]]:
    return [{key: value for key, value in sample.items() if "_ms" not in key} for sample in recorded(cell)]


@pytest.mark.parametrize("flag", [True, False])
def test_chat_template(tmp_path: Path, chat_model: ModelWrapper, flag: bool):
    found = {}
    for chat_template in ("official", "always", "never"):
        dataset = DatasetConfig(name="demo_qa_512", max_new_tokens=4, chat_template=flag)
        cell = demo_cell(tmp_path, dataset=dataset, chat_template=chat_template)
        run_cell(cell, chat_model)
        found[chat_template] = without_times(cell)
    assert found["official"] == found["always" if flag else "never"]
    assert found["official"] != found["never" if flag else "always"]


def test_a_model_without_a_chat_template_is_refused_before_any_sample(tmp_path: Path, model: ModelWrapper):
    cell = demo_cell(tmp_path, chat_template="always")
    with pytest.raises(ValueError, match="chat_template=always: tiny has no chat template, allowed: official, never"):
        run_cell(cell, model)
    assert not (cell.folder / "predictions.jsonl").exists()


def test_truncate(tmp_path: Path, model: ModelWrapper):
    cells = {truncate: demo_cell(tmp_path, truncate=truncate) for truncate in ("middle", "left", "right")}
    for cell in cells.values():
        assert run_cell(cell, model)["n_truncated"] == 3
    samples = {truncate: recorded(cell) for truncate, cell in cells.items()}
    predictions = [tuple(sample["prediction"] for sample in found) for found in samples.values()]
    assert len(set(predictions)) == 3


def test_first_token(tmp_path: Path, model: ModelWrapper):
    for first_token, fed_after in (("full", 0), ("compressed", 1)):
        cell = demo_cell(tmp_path, first_token=first_token)
        run_cell(cell, model)
        for sample in recorded(cell):
            assert sample["compressed_tokens"] == sample["prompt_tokens"] - fed_after


@pytest.mark.parametrize("key", AXES)
def test_a_value_is_in_the_records_and_in_the_folder(tmp_path: Path, model: ModelWrapper, key: str):
    default, cell = demo_cell(tmp_path, max_samples=1), demo_cell(tmp_path, max_samples=1, **{key: AXES[key]})
    assert cell.folder == default.folder.parent / f"demo_qa,{key}={AXES[key]}"
    assert not cell.shares_prefill_with(default)
    run_cell(cell, model)
    for of, wanted in ((default, getattr(default, key)), (cell, AXES[key])):
        run_cell(of, model)
        identity = json.loads((of.folder / "config.json").read_text())
        metrics = json.loads((of.folder / "metrics.json").read_text())
        assert identity[key] == metrics["config"][key] == wanted


def test_a_file_of_prompts_is_in_the_records_and_in_the_folder(tmp_path: Path, model: ModelWrapper):
    row = {"input": "q", "answers": ["a"], "length": 1, "dataset": "trec", "language": "en", "all_classes": ["a"]}
    (tmp_path / "trec.jsonl").write_text(json.dumps(row | {"_id": "1", "context": "some text"}) + "\n")
    dataset = DatasetConfig(name="trec", max_new_tokens=2)
    cell = demo_cell(tmp_path, dataset=dataset, data_dir=str(tmp_path), prompts="file")
    cells = []
    for name in ("short", "long"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({"trec": f"{name}: {{context}} {{input}}"}))
        cells.append(replace(cell, prompts_file=str(file)))
        run_cell(cells[-1], model)
        assert cells[-1].folder.name == f"trec,prompts_file={name}.json"
        identity = json.loads((cells[-1].folder / "config.json").read_text())
        metrics = json.loads((cells[-1].folder / "metrics.json").read_text())
        assert identity["prompts"] == metrics["config"]["prompts"] == metrics["prompt"]["source"] == "file"
        assert metrics["config"]["prompts_file"] == str(file)
        assert identity["prompt_sha256"] == metrics["prompt"]["sha256"]
    moved = tmp_path / "elsewhere" / "short.json"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "short.json").read_bytes())
    run_cell(replace(cells[0], prompts_file=str(moved)), model)  # known by its text
    moved.write_bytes((tmp_path / "long.json").read_bytes())
    with pytest.raises(ValueError, match="prompt_sha256"):
        run_cell(replace(cells[0], prompts_file=str(moved)), model)


def test_methods_that_differ_in_anything_share_a_prefill(tmp_path: Path):
    cell = demo_cell(tmp_path, method=H2O(32))
    assert cell.shares_prefill_with(replace(cell, method=TOVA(0.5)))
    assert cell.shares_prefill_with(replace(cell, method=H2O(32, granularity="layer", evict_every=4)))


def test_kept_by_layer_is_in_both_records(tmp_path: Path):
    model = replace(MODEL, max_length=4000)  # whole prompts, of different lengths
    cell = demo_cell(tmp_path, method=H2O(0.25), model=model, dataset=DatasetConfig("demo_qa_512", max_new_tokens=2))
    metrics = run_cell(cell, ModelWrapper(model))
    samples = recorded(cell)
    for sample in samples:
        assert sample["kept_by_layer"] == [sample["budget_tokens"]] * 4
        assert sample["kept_tokens"] == sample["budget_tokens"]
    kept = [sample["kept_tokens"] for sample in samples]
    assert len(set(kept)) > 1
    assert metrics["mean_kept_by_layer"] == [pytest.approx(sum(kept) / 3)] * 4
