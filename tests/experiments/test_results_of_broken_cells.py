"""Cells broken in each way, and cells that a run is at work on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.longbench_qa import recorded_cells
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.recorded_cells import (
    COMPLETE,
    CORRUPT,
    FAILED,
    FOREIGN,
    HALF_WRITTEN,
    HAS_SAMPLES,
    INCOMPLETE,
    OLD_FORMAT,
    SAMPLE_COLUMNS,
)
from experiments.longbench_qa.records import FORMAT
from experiments.longbench_qa.results import cell_means, load_results, main
from tests.experiments.cell_edits import (
    H2O_CELL,
    cell_of,
    change,
    change_sample,
    copy_of,
    cut,
    fail,
    finish_three_cells,
    last_line_gone,
    remove,
    samples_in,
    snapshot,
    twice,
    write,
    write_samples,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    return finish_three_cells(tmp_path_factory.mktemp("results"))


@pytest.fixture
def folder(finished: list[Cell], tmp_path: Path) -> Path:
    """A copy of their output_dir."""
    return copy_of(finished, tmp_path / "results")


READABLE = [
    (last_line_gone, INCOMPLETE, "1 of 3 samples are missing"),
    (cut("predictions.jsonl", 1), INCOMPLETE, "1 of 3 samples are missing, the last line is cut short"),
    (cut("predictions.jsonl", 40), INCOMPLETE, "1 of 3 samples are missing, the last line is cut short"),
    (remove("predictions.jsonl"), INCOMPLETE, "3 of 3 samples are missing"),
    (remove("predictions.jsonl", "metrics.json"), INCOMPLETE, "nothing is recorded yet"),
    (change("metrics.json", n_rows=5, status="incomplete"), INCOMPLETE, "2 of 5 samples are missing"),
    (change("metrics.json", status="incomplete"), INCOMPLETE, "metrics.json is not over all samples yet"),
    (fail, FAILED, "1 of 3 samples failed, the first with RuntimeError: no memory left"),
    (lambda path: (fail(path), cut("predictions.jsonl", 1)(path)), INCOMPLETE, "are missing, 1 failed, the last line"),
    (change("metrics.json", n_rows=2), COMPLETE, "3 samples are recorded, 2 were asked for last"),
    (change_sample(0, prefill_shared=...), COMPLETE, ""),
]
UNREADABLE = [
    (write("config.json", '{"format": 3, "mod'), CORRUPT, "config.json is not JSON"),
    (write("config.json", "[3]"), CORRUPT, "config.json is not a JSON object"),
    (change("config.json", method=...), CORRUPT, "config.json names no method"),
    (change("config.json", model="tiny"), CORRUPT, "config.json names no model"),
    (cut("metrics.json", 30), CORRUPT, "metrics.json is not JSON"),
    (change("config.json", path="/"), CORRUPT, "config.json has a key path"),
    (change("config.json", score=1), CORRUPT, "config.json has a key score"),
    (change("metrics.json", n_rows=10**30), CORRUPT, "metrics.json lacks n_rows"),
    (change("metrics.json", n_rows="3"), CORRUPT, "metrics.json lacks n_rows"),
    (change("metrics.json", budget_kind=...), CORRUPT, "metrics.json lacks n_rows or budget_kind"),
    (write("predictions.jsonl", "\x00\n"), CORRUPT, "line 1 is not JSON"),
    (write("predictions.jsonl", "[" * 100_000 + "\n"), CORRUPT, "line 1 is not JSON"),
    (lambda path: (path / "predictions.jsonl").write_bytes(b"\xff\n"), CORRUPT, "line 1 is not JSON"),
    (twice, CORRUPT, "line 4: sample 'one_fact_early-1024-000' is there twice"),
    (change_sample(2, score=...), CORRUPT, "line 3: score is not as"),
    (change_sample(1, score=None), CORRUPT, "line 2: score is not as"),
    (change_sample(1, score=float("nan")), CORRUPT, "line 2: score is not as"),
    (change_sample(1, score=True), CORRUPT, "line 2: score is not as"),
    (change_sample(1, error=...), CORRUPT, "line 2: error is not as"),
    (change_sample(1, error="RuntimeError"), CORRUPT, "line 2: score is not as"),  # failed, and yet scored
    (change_sample(1, model="other"), CORRUPT, "line 2: model is not as"),
    (change_sample(1, prediction="\ud800"), CORRUPT, "line 2 is not JSON"),
    (change_sample(1, id=7), CORRUPT, "line 2: id is not as"),
    (change_sample(1, answers=["one", 2]), CORRUPT, "line 2: answers is not as"),
    (change_sample(1, answers="one"), CORRUPT, "line 2: answers is not as"),
    (change_sample(1, kept_tokens=...), CORRUPT, "line 2: kept_tokens is not as"),
    (change_sample(1, kept_tokens="32"), CORRUPT, "line 2: kept_tokens is not as"),
    (change_sample(1, cache_bytes=10**400), CORRUPT, "line 2: cache_bytes is not as"),
    (change_sample(1, truncated=2), CORRUPT, "line 2: truncated is not as"),
    (change_sample(1, effective=[]), CORRUPT, "line 2: effective is not as"),
    (lambda path: ((path / "metrics.json").unlink(), (path / "metrics.json").mkdir()), CORRUPT, "cannot be read: Is a"),
    (write("config.json", '{"model_type": "llama"}'), FOREIGN, "config.json was not written by this harness"),
    (change("metrics.json", format=...), FOREIGN, "metrics.json was not written by this harness"),
    (change("config.json", method={"name": "tova"}), FOREIGN, "h2o/b32/demo_qa is not where such a cell lies"),
    (change("config.json", format=FORMAT - 1), OLD_FORMAT, f"format {FORMAT - 1}, this version reads format {FORMAT}"),
    (change("metrics.json", format=FORMAT + 1), OLD_FORMAT, f"metrics.json is of format {FORMAT + 1}"),
    (remove("config.json"), HALF_WRITTEN, "no config.json"),
    (remove("config.json", "metrics.json", "predictions.jsonl"), HALF_WRITTEN, "no config.json"),  # the lock is left
    (remove("metrics.json"), HALF_WRITTEN, "predictions.jsonl without metrics.json"),
]


@pytest.mark.parametrize(("spoil", "status", "reason"), READABLE + UNREADABLE)
def test_what_is_wrong_with_a_cell_is_said_and_the_others_are_read(
    folder: Path, spoil: Callable[[Path], Any], status: str, reason: str
):
    spoil(folder / H2O_CELL)
    before = snapshot(folder)
    results = load_results(folder)
    assert snapshot(folder) == before
    row = cell_of(results, folder / H2O_CELL)
    assert row["status"] == status
    assert reason in row["reason"] and "\n" not in row["reason"] and bool(row["reason"]) == bool(reason)
    assert list(results.cells["status"]).count(COMPLETE) == 2 + (status == COMPLETE)
    of_cell = results.samples[results.samples["path"] == row["path"]]
    assert len(results.samples) - len(of_cell) == 6
    assert set(of_cell["status"]) <= {status}
    if status in HAS_SAMPLES:
        assert row["method"] == "h2o"
        assert row["n"] == of_cell["score"].notna().sum()
        assert row["n_failed"] == of_cell["error"].notna().sum() == of_cell["score"].isna().sum()
    else:
        assert of_cell.empty and pd.isna(row["n"])
    means, left_out = cell_means(results)
    assert (row["path"] in list(means["path"])) == (status == COMPLETE)
    assert list(left_out["path"]) == [row["path"]] * (status != COMPLETE)


def test_a_folder_of_nothing_but_broken_cells_has_the_same_columns(folder: Path, capsys: pytest.CaptureFixture):
    for config in folder.rglob("config.json"):
        config.write_text("{}")
    results = load_results(folder)
    assert set(results.cells["status"]) == {FOREIGN}
    assert results.samples.empty and {"path", "status", "method", *SAMPLE_COLUMNS} <= set(results.samples.columns)
    means, left_out = cell_means(results)
    assert means.empty and len(left_out) == 3 and {"method", "mean", "low", "high"} <= set(means.columns)
    main([str(folder)])
    assert capsys.readouterr().out.count("foreign: ") == 3


def test_a_cell_whose_samples_all_failed_is_read_like_the_others(folder: Path):
    path = folder / H2O_CELL
    failed = {"prediction": None, "score": None, "error": "RuntimeError: no memory left"}
    write_samples(path, [{key: sample[key] for key in ("id", "answers")} | failed for sample in samples_in(path)])
    results = load_results(path)
    assert results.samples["score"].dtype == results.samples["kept_tokens"].dtype == "float64"
    assert results.samples["prefill_shared"].dtype == "boolean" and results.samples["prefill_shared"].isna().all()
    means, _ = cell_means(results, statuses=HAS_SAMPLES)
    assert list(means["n"]) == [0] and means["mean"].isna().all()


def test_a_cell_is_never_complete_while_a_run_extends_it(folder: Path):
    """Every prefix of what a run that extends the cell by two samples does to the folder."""
    path = folder / H2O_CELL
    metrics = json.loads((path / "metrics.json").read_text())
    extra = samples_in(path)[:2]
    steps = [
        change("metrics.json", n_rows=5, status="incomplete"),
        *(
            lambda path, new=new: write_samples(path, [*samples_in(path), new | {"id": new["id"] + "x"}])
            for new in extra
        ),
        change("metrics.json", n_rows=5, n=5, status="complete"),
    ]
    found = []
    for step in steps:
        step(path)
        found.append(cell_of(load_results(path), path)["status"])
    assert metrics["n_rows"] == 3
    assert found == [INCOMPLETE, INCOMPLETE, INCOMPLETE, COMPLETE]


def test_what_a_run_adds_while_its_cell_is_read_does_not_make_it_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    path, read = folder / H2O_CELL, recorded_cells._content
    reads: list[Path] = []

    def and_then_a_run_goes_on(file: Path) -> bytes | None:
        content = read(file)
        if not reads:
            change("metrics.json", n_rows=5, status="incomplete")(path)
            write_samples(path, [*samples_in(path), samples_in(path)[0] | {"id": "another"}])
        reads.append(file)
        return content

    monkeypatch.setattr(recorded_cells, "_content", and_then_a_run_goes_on)
    assert cell_of(load_results(path), path)["reason"] == "2 of 5 samples are missing"
