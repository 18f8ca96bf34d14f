"""A group of more cells than the limit of open files allows runs in parts."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from cab_attention import StreamingLLM
from experiments.longbench_qa import in_process, open_files
from experiments.longbench_qa.open_files import MOST_FILES, cells_at_a_time
from tests.experiments.cells import demo_cell, recorded

ROOT = Path(__file__).resolve().parents[2]
INFINITY = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("limits", "raised_to", "cells"),
    [
        ((256, 256), None, 42),
        ((256, 4096), 4096, 682),
        ((1024, 1_048_576), MOST_FILES, 10922),
        ((1024, INFINITY), MOST_FILES, 10922),
        ((100_000, 1_048_576), None, 16666),  # never lowered
        ((INFINITY, INFINITY), None, 10922),
        ((4, 4), None, 1),
    ],
)
def test_the_limit_is_raised_as_far_as_it_may(
    limits: tuple[int, int], raised_to: int | None, cells: int, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda *given: asked.append(given))
    assert cells_at_a_time() == cells
    assert asked == ([] if raised_to is None else [(resource.RLIMIT_NOFILE, (raised_to, limits[1]))])


def test_parts_of_a_group_leave_what_the_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def group(name: str):
        return {5 + n: demo_cell(tmp_path / name, method=StreamingLLM(8 + n), max_samples=2) for n in range(5)}

    parts, inner = [], in_process.run_cells
    monkeypatch.setattr(in_process, "_finished", {})
    monkeypatch.setattr(in_process, "run_cells", lambda cells, *rest: parts.append(len(cells)) or inner(cells, *rest))
    whole = in_process.run_together(group("whole"))
    monkeypatch.setattr(in_process, "cells_at_a_time", lambda: 2)
    split = in_process.run_together(group("split"))
    assert parts == [5, 2, 2, 1]
    assert list(split) == list(whole) == [5, 6, 7, 8, 9]
    for number in whole:
        assert split[number]["score"] == whole[number]["score"]  # type: ignore[index]
    assert "5 cells run in 3 parts" in capsys.readouterr().out


@pytest.mark.slow
def test_sixty_tracked_cells_run_with_few_open_files(tmp_path: Path):
    """150 files are too few for 60 cells and their wandb runs at once."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (120, 150))\n"
        "from pathlib import Path\n"
        "from cab_attention import StreamingLLM\n"
        "from experiments.longbench_qa.in_process import run_together\n"
        "from experiments.longbench_qa.schema import WandbConfig\n"
        "from tests.experiments.cells import demo_cell\n"
        "cells = {n: demo_cell(Path(sys.argv[1]), method=StreamingLLM(8 + n), max_samples=1,"
        " wandb=WandbConfig(mode='offline')) for n in range(60)}\n"
        "assert all(isinstance(result, dict) for result in run_together(cells).values())\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "wandb: cannot" not in done.stderr
    assert "60 cells run in 3 parts" in done.stdout
    cells = [demo_cell(tmp_path, method=StreamingLLM(8 + n)) for n in range(60)]
    assert all(len(recorded(cell)) == 1 for cell in cells)
    assert all(json.loads((cell.folder / "metrics.json").read_text())["status"] == "complete" for cell in cells)
    assert all(len(list((cell.folder / "wandb").glob("offline-run-*/*.wandb"))) == 1 for cell in cells)
