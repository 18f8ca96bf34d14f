import json
from pathlib import Path

import pytest

from experiments.longbench_qa.records import FORMAT, CellRecords

IDENTITY = {"model": {"name": "m"}, "method": {"name": "h2o", "budget": 8}}


def sample(name: str) -> dict:
    return {"id": name, "prediction": "p\n\u2028", "answers": ["a"], "score": 0.0, "error": None}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cell with two samples and metrics."""
    with CellRecords(tmp_path / "cell", IDENTITY) as records:
        records.add(sample("1"))
        records.add(sample("2"))
        records.write_metrics({"format": FORMAT, "n": 2})
    return tmp_path / "cell"


def test_what_was_written_is_read_back(folder: Path):
    with CellRecords(folder, IDENTITY) as records:
        assert list(records.samples.values()) == [sample("1"), sample("2")]
        assert records.metrics["n"] == 2
        records.add(sample("3"))
    assert len((folder / "predictions.jsonl").read_text().split("\n")) == 4


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_short_is_dropped_and_done_again(folder: Path, cut: int):
    whole = (folder / "predictions.jsonl").read_bytes()
    (folder / "predictions.jsonl").write_bytes(whole[:-cut])
    with CellRecords(folder, IDENTITY) as records:
        assert list(records.samples) == ["1"]
        records.add(sample("2"))
    assert (folder / "predictions.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("predictions.jsonl", '{"id": "1"}\n', "predictions.jsonl, line 1"),
        ("predictions.jsonl", "not json\n" + json.dumps(sample("1")) + "\n", "predictions.jsonl, line 1"),
        ("predictions.jsonl", json.dumps(sample("1")) + "\n[]\n", "predictions.jsonl, line 2"),
        ("predictions.jsonl", (json.dumps(sample("1")) + "\n") * 2, "twice"),
        ("config.json", "{}", "config.json"),
        ("config.json", "half of a fi", "config.json"),
        ("config.json", json.dumps({"format": FORMAT + 1, **IDENTITY}), f"format {FORMAT + 1}"),
        ("config.json", json.dumps({"format": FORMAT, **IDENTITY, "method": {"name": "tova"}}), "tova"),
        ("metrics.json", "[]", "metrics.json"),
        ("metrics.json", json.dumps({"format": 0}), "format 0"),
    ],
)
def test_what_is_not_ours_is_refused_by_name_and_left_alone(folder: Path, name: str, content: str, named: str):
    (folder / name).write_text(content)
    before = snapshot(folder)
    with pytest.raises(ValueError, match=r".") as refused, CellRecords(folder, IDENTITY):
        pass
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)
    assert snapshot(folder) == before


def test_predictions_without_a_config_are_not_ours(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"), CellRecords(folder, IDENTITY):
        pass
    assert not (folder / "config.json").exists()


def test_the_second_process_learns_who_holds_the_cell(folder: Path):
    with CellRecords(folder, IDENTITY), pytest.raises(ValueError, match=r"process \d+ on .* since"):
        CellRecords(folder, IDENTITY).__enter__()
    with CellRecords(folder, IDENTITY):
        pass  # free again


def test_a_refused_folder_is_not_held(folder: Path):
    for _ in range(2):
        with pytest.raises(ValueError, match="another cell"), CellRecords(folder, {"other": 1}):
            pass


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(ValueError, match="/proc/nowhere"), CellRecords(Path("/proc/nowhere/cell"), IDENTITY):
        pass
