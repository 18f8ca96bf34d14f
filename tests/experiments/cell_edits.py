"""Three finished cells of the built-in tiny model, and edits that break one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cab_attention import H2O, SnapKV
from experiments.longbench_qa.cell import run_cells
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.results import Results
from tests.experiments.cells import MODEL, demo_cell

METHODS = [H2O(32), H2O(0.25, recent=4), SnapKV(32, granularity="layer")]
H2O_CELL = Path("tiny,max_length=300", "h2o", "b32", "demo_qa")
METHOD_OF_LAYERS = "snapkv,granularity=layer"


def finish_three_cells(output_dir: Path) -> list[Cell]:
    """Complete cells of three samples, one of each of `METHODS`."""
    cells = [demo_cell(output_dir, method=method) for method in METHODS]
    assert all(isinstance(metrics, dict) for metrics in run_cells(cells, ModelWrapper(MODEL)))
    return cells


def copy_of(cells: list[Cell], folder: Path) -> Path:
    """Of their output_dir."""
    return Path(shutil.copytree(cells[0].output_dir, folder))


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
