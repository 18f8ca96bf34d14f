import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cab_attention import H2O, Full
from experiments.longbench_qa import cell as cell_module
from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.schema import DatasetConfig
from tests.experiments import cells
from tests.experiments.cells import MODEL, recorded


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL)


@pytest.fixture
def demo_cell(tmp_path: Path) -> Cell:
    return cells.demo_cell(tmp_path)


def test_a_cell_leaves_its_records(demo_cell: Cell, model: ModelWrapper):
    seen = []
    metrics = run_cell(demo_cell, model, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    samples = recorded(demo_cell)
    assert len({sample["id"] for sample in samples}) == len(samples) == 3
    assert json.loads((demo_cell.folder / "metrics.json").read_text()) == metrics
    assert metrics["n"] == 3
    assert metrics["n_failed"] == 0
    assert metrics["status"] == "complete"
    assert metrics["score"] == sum(sample["score"] for sample in samples) / 3
    assert metrics["budget_kind"] == "tokens"
    assert metrics["mean_kept_tokens"] == metrics["mean_budget_tokens"] == 32
    assert metrics["mean_cache_bytes"] == samples[0]["cache_bytes"]
    assert metrics["config"]["method"] == {"name": "h2o", **asdict(H2O(32))}
    assert metrics["environments"][-1]["packages"]["torch"]
    assert metrics["model"]["attention"] == "cab"
    assert metrics["config"]["max_samples"] == 3
    assert metrics["data"]["source"] == metrics["prompt"]["source"] == "builtin"
    assert metrics["effective"] == {"window_eff": [16, 16]}


def test_a_rerun_skips_what_is_there_and_more_samples_extend_it(
    demo_cell: Cell, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch
):
    run_cell(demo_cell, model)
    before = (demo_cell.folder / "predictions.jsonl").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(ModelWrapper, "load", lambda *args, **kwargs: pytest.fail("nothing is left to do"))
        assert run_cell(demo_cell, model)["n"] == 3
    metrics = run_cell(replace(demo_cell, max_samples=5), model)
    after = (demo_cell.folder / "predictions.jsonl").read_text()
    assert metrics["n"] == 5
    assert after.startswith(before)
    assert len(after.splitlines()) == 5


def test_a_line_cut_short_is_done_again(demo_cell: Cell, model: ModelWrapper):
    run_cell(demo_cell, model)
    path = demo_cell.folder / "predictions.jsonl"
    whole = recorded(demo_cell)
    path.write_bytes(path.read_bytes()[:-20])
    run_cell(demo_cell, model)
    assert [sample["prediction"] for sample in recorded(demo_cell)] == [sample["prediction"] for sample in whole]


def test_a_failed_sample_is_recorded_and_not_scored(
    demo_cell: Cell, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch
):
    generate = ModelWrapper._generate

    def fail_once(self, prompt, method, options):
        if options["sample_id"] == lines_before[1]:
            raise RuntimeError("no memory left")
        return generate(self, prompt, method, options)

    lines_before = [row.id for row in cell_module.load_data("demo_qa", None, 3)[0]]
    monkeypatch.setattr(ModelWrapper, "_generate", fail_once)
    metrics = run_cell(demo_cell, model)
    samples = recorded(demo_cell)
    assert [sample["error"] for sample in samples] == [None, "RuntimeError: no memory left", None]
    assert samples[1]["score"] is None
    assert (metrics["n"], metrics["n_failed"], metrics["status"]) == (2, 1, "incomplete")
    assert metrics["score"] == (samples[0]["score"] + samples[2]["score"]) / 2


def test_another_cell_in_the_folder_is_refused(demo_cell: Cell, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    run_cell(demo_cell, model)
    monkeypatch.setattr(Cell, "folder", demo_cell.folder)
    with pytest.raises(ValueError, match="holds another cell"):
        run_cell(replace(demo_cell, method=Full()), model)


def test_other_data_in_the_folder_is_refused(longbench: Path, demo_cell: Cell, tmp_path: Path):
    rows = (longbench / "data" / "hotpotqa.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "hotpotqa.jsonl").write_bytes(rows[0])
    cell = replace(
        demo_cell,
        model=replace(MODEL, max_length=1024),
        dataset=DatasetConfig(name="hotpotqa", max_new_tokens=2),
        data_dir=str(tmp_path),
        prompts="file",
        prompts_file=str(longbench / "config" / "dataset2prompt.json"),
    )
    run_cell(cell, ModelWrapper(cell.model))
    (tmp_path / "hotpotqa.jsonl").write_bytes(rows[1])
    with pytest.raises(ValueError, match="data_sha256"):
        run_cell(cell, ModelWrapper(cell.model))


def test_a_finished_cell_keeps_what_it_was_made_with(demo_cell: Cell, model: ModelWrapper):
    first = run_cell(demo_cell, model)
    again = run_cell(demo_cell, model)
    assert again == first


def test_longbench_e_has_its_length_buckets(longbench: Path, demo_cell: Cell):
    cell = replace(
        demo_cell,
        model=replace(MODEL, max_length=1024),
        dataset=DatasetConfig(name="hotpotqa_e", max_new_tokens=2),
        data_dir=str(longbench / "data"),
        prompts="file",
        prompts_file=str(longbench / "config" / "dataset2prompt.json"),
        max_samples=4,
    )
    metrics = run_cell(cell, ModelWrapper(cell.model))
    assert set(metrics["score_by_length"]) <= {"0-4k", "4-8k", "8k+"}
    assert metrics["score_by_length"]


def test_foreign_lines_are_refused_by_number(demo_cell: Cell, model: ModelWrapper):
    run_cell(demo_cell, model)
    path = demo_cell.folder / "predictions.jsonl"
    path.write_text(path.read_text() + '{"other": 1}\n')
    with pytest.raises(ValueError, match="line 4"):
        run_cell(demo_cell, model)


def test_bad_requests_are_refused_before_the_model_loads(demo_cell: Cell, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ModelWrapper, "load", lambda *args, **kwargs: pytest.fail("too late"))
    for changes in (
        {"dataset": DatasetConfig(name="hotpotqa", max_new_tokens=4), "data_dir": "/proc/nowhere"},
        {"max_samples": 0},
        {"output_dir": "/proc/nowhere"},
    ):
        with pytest.raises(ValueError, match=r"."):
            run_cell(replace(demo_cell, **changes), ModelWrapper(MODEL))


def test_real_rows_run(longbench: Path, demo_cell: Cell, model: ModelWrapper):
    cell = replace(
        demo_cell,
        dataset=DatasetConfig(name="hotpotqa", max_new_tokens=4),
        data_dir=str(longbench / "data"),
        prompts="file",
        prompts_file=str(longbench / "config" / "dataset2prompt.json"),
        max_samples=2,
        compress="after_context",
    )
    # The instruction is repeated after the context: it has to fit into the half that a truncated prompt keeps.
    metrics = run_cell(
        replace(cell, model=replace(MODEL, max_length=1024)), ModelWrapper(replace(MODEL, max_length=1024))
    )
    assert (metrics["n"], metrics["n_failed"], metrics["n_truncated"]) == (2, 0, 2)
