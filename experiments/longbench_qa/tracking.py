"""One Weights & Biases run a cell. The cell's own records never depend on it: a failure here is told and survived."""

import hashlib
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.schema import WandbConfig

PATIENCE_S = 30.0  # for the start and for the end of a run
TABLE = ("id", "prediction", "answers", "score", "answer_kept", "error")


class TrackedRun:
    """A wandb run that may fail: it is told once, and from then on nothing is sent to it.

    Args:
        what: whose it is, for that message: "this cell".
        name: shown, and with `belongs_to` what the run's id comes from; a run of the same id goes on where it was.
        folder: that wandb writes into.
        config: shown with the run.
    """

    def __init__(
        self, what: str, wandb_config: WandbConfig, name: str, folder: str, config: dict[str, Any], belongs_to: str = ""
    ) -> None:
        self._what = what
        self._run: Any = None
        if wandb_config.mode != "disabled":
            self._try("start", lambda: self._start(wandb_config, name, folder, config, belongs_to))

    def _start(
        self, wandb_config: WandbConfig, name: str, folder: str, config: dict[str, Any], belongs_to: str
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=wandb_config.project,
            group=wandb_config.group,
            name=name,
            id=hashlib.sha256((belongs_to + name).encode()).hexdigest()[:16],
            resume="allow",
            mode=wandb_config.mode,  # type: ignore[arg-type]
            dir=folder,
            config=config,
            # Cells that share their prefills have their runs open side by side.
            settings=wandb.Settings(console="off", silent=True, init_timeout=PATIENCE_S, reinit="create_new"),
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log values, as wandb takes them, at a step: the number of samples that they are of."""
        self._try("log", lambda: self._run.log(values, step=step))

    def finish(self, last: Callable[[], dict[str, Any]], summary: dict[str, Any]) -> None:
        """Log what `last` makes, write the summary and close the run, for all of which it gets `PATIENCE_S`."""

        def close() -> None:
            self._run.log(last())
            self._run.summary.update(summary)
            self._run.finish()

        self._try("finish", lambda: _within_patience(close))

    def _try(self, step: str, action: Callable[[], None]) -> None:
        if self._run is None and step != "start":
            return
        try:
            action()
        except Exception as error:  # whatever wandb raises, the records matter more
            self._run = None
            print(f"wandb: cannot {step}, {self._what} goes on without it: {error}", file=sys.stderr)


class Tracker(TrackedRun):
    """Logs a cell's running score, then its metrics as the run's summary and its predictions as a table."""

    def __init__(self, cell: Cell) -> None:
        name = str(cell.folder.relative_to(cell.output_dir))
        config = cell.identity() | {"budget": str(cell.method.parsed_budget), "seed": cell.seed}
        super().__init__("this cell", cell.wandb, name, str(cell.folder), config)

    def finish_cell(self, metrics: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
        """Write summary and table and close the run."""
        rows = [[str(sample.get(key)) for key in TABLE] for sample in samples]

        def last() -> dict[str, Any]:
            import wandb

            return {"predictions": wandb.Table(columns=list(TABLE), data=rows)}

        self.finish(last, metrics)


def _within_patience(action: Callable[[], None]) -> None:
    """Do it in another thread, which is left behind if it takes too long (TimeoutError)."""
    failures: list[Exception] = []

    def attempt() -> None:
        try:
            action()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {PATIENCE_S:g} s")
    if failures:
        raise failures[0]
