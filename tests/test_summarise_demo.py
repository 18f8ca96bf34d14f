import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

import summarise_demo

FAMILIES = ("one_fact_early", "one_fact_middle", "one_fact_late", "two_hop", "list", "passage")
HERE = {"python": "3.11", "gpu": None, "commit": "abc"}


def add_cell(
    output_dir: Path,
    method: str,
    budget: str,
    scores: list[float],
    compress: str = "after_prompt",
    first_token: str = "full",
    **changes: Any,
) -> Path:
    """A complete cell with one sample of each family for every score; `changes` to its config."""
    tokens = 1000 if budget == "full" else int(budget)
    samples = [
        {
            "id": f"{family}-1024-{number:03}",
            "score": score,
            "error": None,
            "budget_tokens": tokens,
            "kept_tokens": float(tokens),
            "cache_bytes": 8192 * tokens,
            "answer_kept": 0.5,
            "answer_kept_heads": [[0.0, 1.0], [0.25, 0.75 if number else 0.5]],
        }
        for number, score in enumerate(scores)
        for family in FAMILIES
    ]
    metrics = {
        "status": "complete",
        "budget": budget,
        "model": {"device": "cpu"},
        "data": {"sha256": "1"},
        "prompt": {"sha256": "2"},
        "environments": [HERE],
    }
    name = changes.pop("dataset", "demo_qa")
    config = {
        "model": {"name": "demo"},
        "method": {"name": method.split(",")[0]},
        "dataset": {"name": name},
        "attention": "cab",
        "compress": compress,
        "first_token": first_token,
    }
    suffix = "" if compress == "after_prompt" else f",compress={compress}"
    folder = output_dir / "demo" / method / f"b{budget}" / f"{name}{suffix}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def summarise(results: Path, output: Path) -> dict[str, str]:
    summarise_demo.main([str(results), "--output", str(output)])
    return {file.name: file.read_text() for file in output.iterdir()}


def test_the_tables(tmp_path: Path):
    for compress in ("after_context", "after_prompt"):
        add_cell(tmp_path / "out", "snapkv,window=16", "64", [40, 60], compress)
        add_cell(tmp_path / "out", "cab", "64", [40, 60], compress)
        add_cell(tmp_path / "out", "snapkv", "128", [80, 100], compress)
        add_cell(tmp_path / "out", "snapkv", "64", [50, 100], compress)
        add_cell(tmp_path / "out", "full", "full", [100, 100], compress)
    add_cell(tmp_path / "out", "h2o", "64", [10, 20], dataset="hotpotqa")  # not of the demo
    files = summarise(tmp_path / "out", tmp_path / "demo")
    rows = list(csv.DictReader(files["results.csv"].splitlines()))
    assert list(dict.fromkeys((row["compress"], row["method"], row["budget"]) for row in rows)) == [
        (compress, method, budget)
        for compress in ("after_prompt", "after_context")
        for method, budget in (
            ("full", "full"),
            ("cab", "64"),
            ("snapkv", "64"),
            ("snapkv", "128"),
            ("snapkv,window=16", "64"),
        )
    ]
    assert [row["family"] for row in rows[:8]] == [*FAMILIES, "all", FAMILIES[0]]
    wanted = {"compress": "after_prompt", "method": "snapkv", "budget": "64"}
    of_cell = [row for row in rows if row.items() >= wanted.items()]
    numbers = {"answer_kept": "0.5000", "kept_tokens": "64.0", "cache_bytes": "524288"}
    assert of_cell[0] == wanted | {
        "family": "one_fact_early",
        "n": "2",
        "score": "75.00",
        "standard_error": "25.00",
        **numbers,
    }
    assert of_cell[-1] == wanted | {"family": "all", "n": "12", "score": "75.00", "standard_error": "7.54", **numbers}
    heads = [
        row for row in csv.DictReader(files["answer_kept_heads.csv"].splitlines()) if row.items() >= wanted.items()
    ]
    assert [(row["layer"], row["head"], row["answer_kept"]) for row in heads] == [
        ("0", "0", "0.0000"),
        ("0", "1", "1.0000"),
        ("1", "0", "0.2500"),
        ("1", "1", "0.6250"),
    ]
    assert json.loads(files["environment.json"])["environments"] == [HERE]


def test_the_plot(tmp_path: Path):
    for compress in ("after_prompt", "after_context"):
        add_cell(tmp_path / "out", "full", "full", [100, 100], compress)
        for budget in ("64", "128"):
            add_cell(tmp_path / "out", "snapkv", budget, [50, 100], compress)
    first, second = (summarise(tmp_path / "out", tmp_path / name)["score.svg"] for name in ("first", "second"))
    assert first == second
    for text in (*FAMILIES, "all", "snapkv", "full cache", "after_prompt", "after_context"):
        assert f"<!-- {text} -->" in first


def break_status(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"status": "incomplete"}))


def lose_metrics(folder: Path) -> None:
    (folder / "metrics.json").unlink()


def fail_a_sample(folder: Path) -> None:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    failed = json.dumps(json.loads(lines[0]) | {"score": None, "error": "boom"})
    (folder / "predictions.jsonl").write_text("\n".join([failed, *lines[1:]]) + "\n")


def lose_a_sample(folder: Path) -> None:
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    (folder / "predictions.jsonl").write_text("\n".join(lines[1:]) + "\n")


def change_the_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": {"name": "tiny"}}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (break_status, "incomplete"),
        (lose_metrics, "incomplete"),
        (fail_a_sample, "1 failed"),
        (lose_a_sample, "other samples"),
        (change_the_model, "another model"),
    ],
)
def test_a_cell_that_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Any, reason: str):
    add_cell(tmp_path / "out", "cab", "64", [50, 100])
    folder = add_cell(tmp_path / "out", "snapkv", "64", [50, 100])
    spoil(folder)
    with pytest.raises(SystemExit):
        summarise(tmp_path / "out", tmp_path / "demo")
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(folder) in message and reason in message
    assert not (tmp_path / "demo").exists()


def test_no_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        summarise(tmp_path, tmp_path / "demo")
    assert "no demo cells" in capsys.readouterr().err
