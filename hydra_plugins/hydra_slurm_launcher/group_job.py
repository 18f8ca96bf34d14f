"""One group of a sweep as a job: what is pickled when the sweep starts and called where the job runs."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.longbench_qa.config import Cell

REPOSITORY = Path(__file__).resolve().parents[2]
# The pickle is read before any line of this project runs, and another package may be named `experiments`.
PYTHON_PATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))


class GroupJob:
    """The cells of one group, as they were composed: a change of conf/ while the job waits is none of theirs."""

    def __init__(self, cells: "dict[int, Cell]") -> None:
        self.cells = cells

    def __call__(self) -> dict[int, str | None]:
        """Run the cells; of each, what went wrong with it, or None. Its metrics are in its folder."""
        from experiments.longbench_qa.in_process import run_together

        results = run_together(self.cells)
        for number, result in results.items():
            if isinstance(result, Exception):
                print(f"error: {self.cells[number].folder}: {result}", flush=True)
        return {number: str(result) if isinstance(result, Exception) else None for number, result in results.items()}


class RequeuedGroupJob(GroupJob):
    """A group that Slurm starts again when its time is up or it is preempted; it goes on from its records."""

    def checkpoint(self) -> Any:
        """What submitit writes down for the next start: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class LocalGroupJob(GroupJob):
    """A group on this machine, which SIGTERM ends: nothing would kill it later, as Slurm does."""

    def __call__(self) -> dict[int, str | None]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return super().__call__()
