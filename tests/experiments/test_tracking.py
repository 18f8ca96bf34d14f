"""wandb may fail in any way: the cell's own records are complete all the same."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb

from experiments.longbench_qa import tracking
from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.schema import WandbConfig
from tests.experiments.cells import MODEL, demo_cell, recorded


class Run:
    """A wandb run that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.summary: dict = {}
        self.finished = False

    def log(self, values: dict, step: int | None = None) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def boom(*args, **kwargs):
    raise RuntimeError("boom")


@pytest.fixture
def tracked(tmp_path: Path):
    return demo_cell(tmp_path, wandb=WandbConfig(mode="offline", group="g"))


def test_a_run_gets_everything(tracked, monkeypatch: pytest.MonkeyPatch):
    run, given = Run(), {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    metrics = run_cell(tracked, ModelWrapper(MODEL))
    assert [values.keys() for values in run.logged] == [{"running_score"}] * 3 + [{"predictions"}]
    assert len(run.logged[-1]["predictions"].data) == 3
    assert run.summary == metrics
    assert run.finished
    assert given["mode"] == "offline"
    assert given["group"] == "g"
    assert given["config"]["method"]["name"] == "h2o"


def test_the_runs_id_is_the_cells(tracked, monkeypatch: pytest.MonkeyPatch):
    ids = []
    monkeypatch.setattr(wandb, "init", lambda **options: ids.append(options["id"]) or Run())
    for samples in (1, 2):
        run_cell(replace(tracked, max_samples=samples), ModelWrapper(MODEL))
    run_cell(replace(tracked, compress="after_context"), ModelWrapper(MODEL))
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("broken", ["init", "log", "finish", "hang"])
def test_failures_are_told_and_survived(
    tracked, broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run = SimpleNamespace(log=lambda *a, **k: None, summary={}, finish=lambda: None)
    if broken in ("log", "finish"):
        setattr(run, broken, boom)
    if broken == "hang":
        monkeypatch.setattr(tracking, "PATIENCE_S", 0.2)
        run.finish = lambda: time.sleep(5)
    monkeypatch.setattr(wandb, "init", boom if broken == "init" else lambda **options: run)
    began = time.monotonic()
    metrics = run_cell(tracked, ModelWrapper(MODEL))
    assert time.monotonic() - began < 5
    assert len(recorded(tracked)) == metrics["n"] == 3
    assert metrics["status"] == "complete"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith(f"wandb: cannot {'start' if broken == 'init' else broken.replace('hang', 'finish')}")


def test_disabled_does_not_touch_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wandb, "init", boom)
    run_cell(demo_cell(tmp_path), ModelWrapper(MODEL))
