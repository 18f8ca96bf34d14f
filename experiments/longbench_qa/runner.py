"""Run cells of the study: python experiments/longbench_qa/runner.py [overrides]. See conf/ for what there is."""

import sys
from pathlib import Path
from typing import Any

# Another installed package may be named `experiments`: this repository's comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.longbench_qa.cell import run_cell
from experiments.longbench_qa.config import Cell, build_cell, register_schema
from experiments.longbench_qa.interrupt import closing_on_signals
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.summary_table import print_summary

register_schema()

_finished: list[tuple[Cell, dict[str, Any]]] = []  # of this process, for the summary
_models: list[ModelWrapper] = []  # the one in memory, shared by the cells that have it


def _model_for(cell: Cell) -> ModelWrapper:
    if not _models or _models[0].config != cell.model:
        _models.clear()  # free the last one before the next is loaded
        _models.append(ModelWrapper(cell.model))
    return _models[0]


def _run_with_progress(cell: Cell) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(str(cell.folder), visible=False)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        return run_cell(cell, _model_for(cell), show, closing_on_signals)


@hydra.main(config_path="../../conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> None:
    """Translate a composed config into a cell and run it."""
    job = HydraConfig.get()
    try:
        cell = build_cell(config)
        _finished.append((cell, _run_with_progress(cell)))
    except Exception as error:
        if job.mode == RunMode.MULTIRUN:
            # The other cells go on. Hydra itself reports no more than the first failure, at the very end.
            print(f"error: the cell [{job.job.override_dirname}] failed: {error}", file=sys.stderr)
            raise
        if not isinstance(error, ValueError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    finally:
        if _finished:
            print_summary(_finished)
