"""One Weights & Biases run a cell. The cell's own records never depend on it: a failure here is told and survived."""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from experiments.longbench_qa.config import Cell

PATIENCE_S = 30.0  # for the start and for the end of a run
TABLE = ("id", "prediction", "answers", "score", "answer_kept", "error")


class Tracker:
    """Logs a cell's running score, then its metrics as the run's summary and its predictions as a table."""

    def __init__(self, cell: Cell) -> None:
        self._run: Any = None
        if cell.wandb.mode != "disabled":
            self._try("start", lambda: self._start(cell))

    def _start(self, cell: Cell) -> None:
        import wandb

        name = str(cell.folder.relative_to(cell.output_dir))
        self._run = wandb.init(
            project=cell.wandb.project,
            group=cell.wandb.group,
            name=name,
            id=hashlib.sha256(name.encode()).hexdigest()[:16],
            resume="allow",
            mode=cell.wandb.mode,  # type: ignore[arg-type]
            dir=str(cell.folder),
            config=cell.identity() | {"budget": str(cell.method.parsed_budget), "seed": cell.seed},
            # Cells that share their prefills have their runs open side by side.
            settings=wandb.Settings(console="off", silent=True, init_timeout=PATIENCE_S, reinit="create_new"),
        )

    def log_sample(self, n: int, values: dict[str, float]) -> None:
        """Log what is known after `n` samples."""
        self._try("log", lambda: self._run.log(values, step=n))

    def finish(self, metrics: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
        """Write summary and table and close the run, for which it gets `PATIENCE_S`."""
        self._try("finish", lambda: self._finish(metrics, [[str(s.get(key)) for key in TABLE] for s in samples]))

    def _finish(self, metrics: dict[str, Any], rows: list[list[str]]) -> None:
        import wandb

        failures: list[Exception] = []

        def close() -> None:
            try:
                self._run.log({"predictions": wandb.Table(columns=list(TABLE), data=rows)})
                self._run.summary.update(metrics)
                self._run.finish()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=close, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        if thread.is_alive():
            raise TimeoutError(f"no answer within {PATIENCE_S:g} s")
        if failures:
            raise failures[0]

    def _try(self, what: str, action: Callable[[], None]) -> None:
        if self._run is None and what != "start":
            return
        try:
            action()
        except Exception as error:  # whatever wandb raises, the cell's records matter more
            self._run = None
            print(f"wandb: cannot {what}, this cell goes on without it: {error}", file=sys.stderr)
