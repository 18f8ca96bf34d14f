"""Cells of the built-in tiny model, whole and broken in each way, and what is read from them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from cab_attention import H2O, SnapKV
from experiments.longbench_qa import recorded_cells
from experiments.longbench_qa import results as results_module
from experiments.longbench_qa.cell import run_cells
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.generation import Generation
from experiments.longbench_qa.model_wrapper import ModelWrapper
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
from experiments.longbench_qa.records import FORMAT, CellRecords
from experiments.longbench_qa.results import Results, cell_means, load_results, main, to_parquet, values_by_id
from experiments.longbench_qa.significance import mean_interval, paired_difference
from tests.experiments.cells import MODEL, demo_cell, recorded

METHODS = [H2O(32), H2O(0.25, recent=4), SnapKV(32, granularity="layer")]
H2O_CELL = Path("tiny,max_length=300", "h2o", "b32", "demo_qa")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Cell]:
    """Three complete cells of three samples."""
    folder = tmp_path_factory.mktemp("results")
    cells = [demo_cell(folder, method=method) for method in METHODS]
    assert all(isinstance(metrics, dict) for metrics in run_cells(cells, ModelWrapper(MODEL)))
    return cells


@pytest.fixture
def folder(finished: list[Cell], tmp_path: Path) -> Path:
    """A copy of their output_dir."""
    return Path(shutil.copytree(finished[0].output_dir, tmp_path / "results"))


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def samples_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]


def write_samples(path: Path, samples: list[dict[str, Any]]) -> None:
    (path / "predictions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def change(name: str, **keys: Any) -> Callable[[Path], Any]:
    """Keys of a JSON file set; those given as ... are taken out."""

    def edit(path: Path) -> None:
        content = json.loads((path / name).read_text()) | keys
        content = {key: value for key, value in content.items() if value is not ...}
        (path / name).write_text(json.dumps(content))

    return edit


def change_sample(index: int, **keys: Any) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        samples = samples_in(path)
        samples[index] = {key: value for key, value in (samples[index] | keys).items() if value is not ...}
        write_samples(path, samples)

    return edit


def fail(path: Path) -> None:
    samples = samples_in(path)
    keys = ("id", "answers")
    nothing = {"prediction": None, "score": None, "error": "RuntimeError: no memory left\nat all"}
    samples[1] = {key: samples[1][key] for key in keys} | nothing
    write_samples(path, samples)


def cut(name: str, characters: int) -> Callable[[Path], Any]:
    def edit(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:-characters])

    return edit


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text(content)


def remove(*names: str) -> Callable[[Path], Any]:
    return lambda path: [(path / name).unlink() for name in names]


def last_line_gone(path: Path) -> None:
    write_samples(path, samples_in(path)[:-1])


def twice(path: Path) -> None:
    write_samples(path, [*samples_in(path), samples_in(path)[0]])


def cell_of(results: Results, path: Path) -> dict[str, Any]:
    [row] = results.cells[results.cells["path"] == str(path)].to_dict("records")
    return row


def test_a_row_a_sample_with_what_its_cell_is(finished: list[Cell]):
    results = load_results(finished[0].output_dir)
    assert len(results.cells) == 3 and len(results.samples) == 9
    assert set(results.cells["status"]) == {COMPLETE} and set(results.cells["reason"]) == {""}
    for cell in finished:
        [row] = results.cells[results.cells["path"] == str(cell.folder)].to_dict("records")
        model, method, budget, _ = cell.folder.relative_to(cell.output_dir).parts
        assert (row["model"], row["method"], "b" + row["budget"]) == (model, method, budget)
        assert row["budget_kind"] == cell.method.parsed_budget.kind
        assert (row["n"], row["n_rows"], row["n_failed"]) == (3, 3, 0)
        for axis in ("attention", "compress", "first_token", "truncate", "chat_template", "prompts"):
            assert row[axis] == getattr(cell, axis)
        assert row["dataset"] == "demo_qa" and row["dataset.max_new_tokens"] == 4 and pd.isna(row["prefill_chunk"])
        samples = results.samples[results.samples["path"] == str(cell.folder)].to_dict("records")
        for sample, record in zip(samples, recorded(cell), strict=True):
            assert {key: sample[key] for key in ("model", "method", "budget", "status")} == {
                key: row[key] for key in ("model", "method", "budget", "status")
            }
            effective = record.pop("effective")
            assert {key: None if _is_missing(sample[key]) else sample[key] for key in record} == record
            assert {key: sample[f"effective.{key}"] for key in effective} == effective
    by_method = results.cells.set_index("method")
    assert by_method.loc["h2o,recent=4", "method.recent"] == 4
    assert by_method.loc["snapkv,granularity=layer", "method.granularity"] == "layer"
    assert set(by_method.loc["h2o,recent=4", ["budget", "budget_kind", "method.name"]]) == {"0.25", "fraction", "h2o"}


def _is_missing(value: Any) -> bool:
    return not isinstance(value, list) and bool(pd.isna(value))


def test_every_key_of_a_record_has_its_column():
    of_generation = {field.name for field in fields(Generation)} - {"text", "effective"}
    assert of_generation == set(SAMPLE_COLUMNS) - {"id", "score", "error", "prediction", "answers"}


def test_reading_changes_nothing_and_takes_no_lock(folder: Path):
    cell = folder / H2O_CELL
    identity = json.loads((cell / "config.json").read_text())
    with CellRecords(cell, identity):  # held by a run
        before = snapshot(folder)
        results = load_results(folder)
        assert snapshot(folder) == before
    assert set(results.cells["status"]) == {COMPLETE}


def test_folders_overlap_and_cells_are_given_by_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch):
    cell = folder / H2O_CELL
    assert len(load_results(cell).cells) == 1
    assert len(load_results(cell, folder, folder / ".." / folder.name).cells) == 3
    assert len(load_results(cell, folder).samples) == 9
    monkeypatch.chdir(cell)
    assert list(load_results(".").cells["method"]) == ["h2o"]
    monkeypatch.chdir(folder.parent)
    assert sorted(load_results("results").cells["path"])[0].startswith("results/")


def test_a_folder_without_cells_is_refused(tmp_path: Path):
    for name in (".", "nowhere"):
        with pytest.raises(ValueError, match="holds no cells"):
            load_results(tmp_path / name)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot read .*file: Not a directory"):
        load_results(tmp_path / "file")


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


def test_means_are_those_of_the_metrics_and_name_what_they_left_out(folder: Path):
    (folder / H2O_CELL / "predictions.jsonl").write_text("not a record\n")
    means, left_out = cell_means(load_results(folder))
    assert len(means) == 2
    for row in means.to_dict("records"):
        metrics = json.loads((Path(row["path"]) / "metrics.json").read_text())
        assert (row["n"], row["mean"]) == (metrics["n"], pytest.approx(metrics["score"], rel=1e-12))
    [row] = left_out.to_dict("records")
    assert (row["path"], row["reason"]) == (str(folder / H2O_CELL), "predictions.jsonl, line 1 is not JSON")


def test_incomplete_cells_are_averaged_only_if_asked_for(folder: Path):
    path = folder / H2O_CELL
    for index, score in enumerate((10.0, 40.0, 100.0)):
        change_sample(index, score=score, answer_kept=None if index else 0.5)(path)
    fail(path)
    results = load_results(folder)
    means, left_out = cell_means(results, statuses=(COMPLETE, FAILED))
    [row] = means[means["path"] == str(path)].to_dict("records")
    assert (row["n"], row["mean"], row["status"]) == (2, 55.0, FAILED)
    assert (row["low"], row["high"]) == (10.0, 100.0) and left_out.empty
    kept, _ = cell_means(results, "answer_kept", statuses=(FAILED,))
    assert (list(kept["n"]), list(kept["mean"]), list(kept["low"].isna())) == ([1], [0.5], [True])
    with pytest.raises(ValueError, match=r"statuses=\['corrupt'\], allowed is any of complete, incomplete, failed"):
        cell_means(results, statuses=(COMPLETE, CORRUPT))
    with pytest.raises(ValueError, match="value='error', allowed is one of score"):
        cell_means(results, "error")


def test_a_cells_values_go_into_a_comparison(folder: Path):
    one, other = (folder / "tiny,max_length=300" / method / "b32" / "demo_qa" for method in ("h2o", METHOD_OF_LAYERS))
    write_samples(other, samples_in(other)[::-1])
    for index, score in enumerate((10.0, 40.0, 100.0)):
        change_sample(index, score=score)(one)
    results = load_results(folder)
    values = values_by_id(results, str(one))
    assert values == {sample["id"]: sample["score"] for sample in samples_in(one)}
    assert list(values) == sorted(values) != [sample["id"] for sample in samples_in(one)]
    found = paired_difference(values, values_by_id(results, str(other)))
    expected = {sample["id"]: sample["score"] for sample in samples_in(other)}
    assert found.difference.mean == pytest.approx(50 - sum(expected.values()) / 3)
    means, _ = cell_means(results)
    [row] = means[means["path"] == str(one)].to_dict("records")
    interval = mean_interval([values[name] for name in sorted(values)])
    assert (row["mean"], row["low"], row["high"]) == (interval.mean, interval.low, interval.high)
    last_line_gone(one)
    with pytest.raises(ValueError, match=r"is incomplete \(1 of 3 samples are missing\), allowed is complete"):
        values_by_id(load_results(folder), str(one))
    with pytest.raises(ValueError, match="no cell nowhere among 3"):
        values_by_id(results, "nowhere")


METHOD_OF_LAYERS = "snapkv,granularity=layer"


def test_parquet_holds_every_sample_with_its_cells_status(folder: Path, tmp_path: Path):
    pytest.importorskip("pyarrow")
    fail(folder / H2O_CELL)
    results = load_results(folder)
    to_parquet(results, tmp_path / "samples.parquet")
    read = pd.read_parquet(tmp_path / "samples.parquet")
    assert list(read.columns) == list(results.samples.columns)
    assert list(read["status"]) == list(results.samples["status"]) and set(read["status"]) == {COMPLETE, FAILED}
    assert read["score"].equals(results.samples["score"])
    assert [list(answers) for answers in read["answers"]] == list(results.samples["answers"])
    with pytest.raises(ValueError, match="cannot write"):
        to_parquet(results, tmp_path / "nowhere" / "samples.parquet")


def test_an_option_of_several_kinds_becomes_text(folder: Path, tmp_path: Path):
    pytest.importorskip("pyarrow")
    config = json.loads((folder / H2O_CELL / "config.json").read_text())
    change("config.json", method=config["method"] | {"recent": "some"})(folder / H2O_CELL)
    results = load_results(folder)
    found = results.cells.set_index("method")["method.recent"]
    assert found["h2o"] == "some" and found["h2o,recent=4"] == "4" and pd.isna(found[METHOD_OF_LAYERS])
    to_parquet(results, tmp_path / "samples.parquet")


def test_without_pyarrow_the_error_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    results = load_results(folder)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ImportError) as refused:
            to_parquet(results, tmp_path / "samples.parquet")
    assert not (tmp_path / "samples.parquet").exists()

    def refuse(*arguments: Any) -> None:
        raise refused.value

    monkeypatch.setattr(results_module, "to_parquet", refuse)
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), "--parquet", str(tmp_path / "samples.parquet")])
    assert stopped.value.code == 2
    assert "pip install 'cab-attention[parquet]'" in capsys.readouterr().err.splitlines()[-1]


def test_the_table_shows_scores_of_complete_cells_and_why_others_have_none(folder: Path, capsys: pytest.CaptureFixture):
    for index, score in enumerate((0.0, 100.0, 50.0)):
        change_sample(index, score=score)(folder / "tiny,max_length=300" / METHOD_OF_LAYERS / "b32" / "demo_qa")
    last_line_gone(folder / H2O_CELL)
    recent = folder / "tiny,max_length=300" / "h2o,recent=4" / "b0.25" / "demo_qa"
    change("metrics.json", n_rows=2)(recent)
    main([str(folder)])
    told = capsys.readouterr().out.splitlines()
    rows = [[field.strip() for field in line.split("│")[1:-1]] for line in told if line.startswith("│")]
    by_method = {row[1]: row for row in rows}
    assert by_method[METHOD_OF_LAYERS][2:] == ["32", "demo_qa", "complete", "3/3", "50.00", "0.00 to 100.00"]
    assert by_method["h2o"] == ["tiny,max_length=300", "h2o", "32", "demo_qa", "incomplete", "2/3", "-", "-"]
    assert by_method["h2o,recent=4"][4:6] == ["complete", "3/2"]
    assert told[-2:] == [
        f"incomplete: {folder / H2O_CELL}: 1 of 3 samples are missing",
        f"complete: {recent}: 3 samples are recorded, 2 were asked for last",
    ]


def test_the_command_refuses_a_folder_without_cells_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{tmp_path} holds no cells: give the output_dir of a run")


def test_the_runner_does_not_import_it():
    check = (
        "import sys, experiments.longbench_qa.in_process; assert 'experiments.longbench_qa.results' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True, timeout=120)


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
