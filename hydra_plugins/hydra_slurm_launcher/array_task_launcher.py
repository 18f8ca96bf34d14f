"""The launcher `array_task`: one group of the sweep in this process, that of the task's number in a job array."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from hydra.core.config_store import ConfigStore

from hydra_plugins.hydra_shared_prefill_launcher.shared_prefill_launcher import SharedPrefillLauncher

if TYPE_CHECKING:
    from experiments.longbench_qa.config import Cell


@dataclass
class ArrayTaskLauncherConf:
    """`hydra/launcher=array_task`, for scripts/slurm/sweep.sbatch."""

    _target_: str = "hydra_plugins.hydra_slurm_launcher.array_task_launcher.ArrayTaskLauncher"
    task: int | None = None  # from 0; null: SLURM_ARRAY_TASK_ID
    tasks: int | None = None  # how many groups the sweep had when the array was submitted; null: not checked


ConfigStore.instance().store(group="hydra/launcher", name="array_task", node=ArrayTaskLauncherConf)


class ArrayTaskLauncher(SharedPrefillLauncher):
    """Composes the whole sweep and runs one of its groups; the other tasks of the array run the others."""

    def __init__(self, task: int | None, tasks: int | None) -> None:
        number = os.environ.get("SLURM_ARRAY_TASK_ID")
        self.task = int(number) if task is None and number else task
        self.tasks = tasks

    def own_groups(self, together: "Sequence[dict[int, Cell]]") -> "Sequence[dict[int, Cell]]":
        """The task's group. Another number of groups than the array was made for is refused: some would not run."""
        if self.task is None:
            _refuse("needs SLURM_ARRAY_TASK_ID or hydra.launcher.task=N")
        if self.tasks is not None and self.tasks != len(together):
            _refuse(
                f"the array is for {self.tasks} groups, the sweep has {len(together)}: its configuration has changed"
            )
        if not 0 <= self.task < len(together):
            _refuse(f"task {self.task}, the sweep has {len(together)} groups, from 0")
        print(f"task {self.task}: {len(together[self.task])} cells", flush=True)
        return [together[self.task]]


def _refuse(reason: str) -> NoReturn:
    print(f"error: hydra/launcher=array_task: {reason}", file=sys.stderr)
    sys.exit(2)
