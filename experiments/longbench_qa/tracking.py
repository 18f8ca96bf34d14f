"""One Weights & Biases run a cell. The cell's own records never depend on it: a failure here is told and survived."""

import hashlib
import sys
from collections.abc import Callable
from typing import Any

from experiments.longbench_qa.config import Cell


class Tracker:
    """Logs a cell's running score, then its metrics as the run's summary."""

    def __init__(self, cell: Cell) -> None:
        self._run: Any = None
        if cell.wandb.mode != "disabled":
            self._try("start", lambda: self._start(cell))

    def _start(self, cell: Cell) -> None:
        import wandb

        relative = cell.folder.relative_to(cell.output_dir)
        self._run = wandb.init(
            project=cell.wandb.project,
            group=cell.wandb.group,
            name=str(relative),
            id=hashlib.sha256(str(relative).encode()).hexdigest()[:16],
            resume="allow",
            mode=cell.wandb.mode,  # type: ignore[arg-type]
            dir=str(cell.folder),
            config=cell.identity() | {"budget": str(cell.method.parsed_budget), "seed": cell.seed},
            settings=wandb.Settings(console="off", silent=True),
        )

    def log_sample(self, n: int, values: dict[str, float]) -> None:
        """Log what is known after `n` samples."""
        self._try("log", lambda: self._run.log(values, step=n))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the summary and close the run."""
        self._try("finish", lambda: self._finish(metrics))

    def _finish(self, metrics: dict[str, Any]) -> None:
        self._run.summary.update(metrics)
        self._run.finish()

    def _try(self, what: str, action: Callable[[], None]) -> None:
        if self._run is None and what != "start":
            return
        try:
            action()
        except Exception as error:  # whatever wandb raises, the cell's records matter more
            self._run = None
            print(f"wandb: cannot {what}, this cell goes on without it: {error}", file=sys.stderr)
