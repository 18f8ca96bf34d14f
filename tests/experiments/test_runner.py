"""The command itself, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "experiments" / "longbench_qa" / "runner.py"


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUNNER), *overrides, f"output_dir={folder / 'out'}", "model.max_length=300"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def test_a_sweep_shares_the_model_and_survives_a_failing_cell(tmp_path: Path):
    done = run(tmp_path, "-m", "method=full,snapkv", "budget=32,0,0.25", "max_samples=2")
    cells = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("metrics.json"))
    model = "tiny,max_length=300"
    assert cells == [
        f"{model}/full/bfull/demo_qa",
        f"{model}/snapkv/b0.25/demo_qa",
        f"{model}/snapkv/b32/demo_qa",
    ]
    assert done.returncode != 0
    assert "budget=0 is not a budget" in done.stderr
    assert "snapkv" in done.stdout
    for cell in cells:
        metrics = json.loads((tmp_path / "out" / cell / "metrics.json").read_text())
        assert (metrics["n"], metrics["status"]) == (2, "complete")
        assert list((tmp_path / "out" / cell / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "multirun.yaml"}


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path):
    done = run(tmp_path, "budget=abc")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: budget='abc' is not a budget")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
