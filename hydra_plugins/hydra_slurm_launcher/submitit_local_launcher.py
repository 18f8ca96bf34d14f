"""The launcher `submitit_local`: the groups of a sweep side by side on this machine, one process a GPU."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin

from hydra_plugins.hydra_slurm_launcher.group_job import PYTHON_PATH, LocalGroupJob
from hydra_plugins.hydra_slurm_launcher.jobs_launcher import JobsLauncher, wait_for_one

if TYPE_CHECKING:
    from submitit import Job

    from experiments.longbench_qa.config import Cell

NO_TIME_LIMIT_MIN = 10 * 365 * 24 * 60


@dataclass
class SubmititLocalLauncherConf:
    """`hydra/launcher=submitit_local`; the options are `hydra.launcher.KEY=VALUE`."""

    _target_: str = "hydra_plugins.hydra_slurm_launcher.submitit_local_launcher.SubmititLocalLauncher"
    processes: int | None = None  # at a time; null: one a GPU, and at most so many. To be given where there is no GPU
    folder: str | None = None  # which gets one of logs a sweep; null: OUTPUT_DIR/jobs


class StoreLauncher(SearchPathPlugin):
    """Stores the options once every plugin is found: hydra-submitit-launcher has a launcher of the same name."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called before a config is composed; the search path stays as it is."""
        ConfigStore.instance().store(group="hydra/launcher", name="submitit_local", node=SubmititLocalLauncherConf)


class SubmititLocalLauncher(JobsLauncher):
    """Starts a group whenever a GPU (or, without GPUs, one of the processes) is free."""

    name = "submitit_local"
    how_to_stop = "they go on, unless Ctrl-C ended them too; kill -TERM NUMBER ends one"

    def __init__(self, processes: int | None, folder: str | None) -> None:
        self.processes = processes
        self._folder = folder

    @property
    def folder(self) -> str | None:
        """Where each sweep has a folder; None: OUTPUT_DIR/jobs."""
        return self._folder

    def check(self) -> None:
        """Raise ValueError for a number of processes that cannot be."""
        self.slots()

    def slots(self) -> list[str]:
        """What CUDA_VISIBLE_DEVICES is for each of the processes that run at a time; empty text without GPUs."""
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        n_gpus = torch.cuda.device_count()
        gpus = [str(index) for index in range(n_gpus)] if visible is None else visible.split(",")[:n_gpus]
        if self.processes is None:
            if not gpus:
                raise ValueError("hydra.launcher.processes=N: there is no GPU here to count")
            return gpus
        if self.processes < 1 or (gpus and self.processes > len(gpus)):
            allowed = f"from 1 to {len(gpus)}, the GPUs here" if gpus else ">= 1"
            raise ValueError(f"hydra.launcher.processes {allowed}; it is {self.processes}")
        return gpus[: self.processes] or [""] * self.processes

    def ended_jobs(
        self, together: "Sequence[dict[int, Cell]]", folder: Path, going: "dict[str, Job]"
    ) -> "Iterator[tuple[dict[int, Cell], Job]]":
        """Start a group on each slot, and another one on the slot of each that ends."""
        free, waiting = self.slots(), list(together)
        held: dict[str, tuple[str, dict[int, Cell]]] = {}
        while waiting or going:
            while waiting and free:
                slot, group = free.pop(0), waiting.pop(0)
                job = _start(group, slot, folder)
                going[job.job_id], held[job.job_id] = job, (slot, group)
                where = f", GPU {slot}" if slot else ""
                print(f"Process {job.job_id}{where}: {len(group)} cells; log: {job.paths.stdout}", flush=True)
            job = wait_for_one(going)
            slot, group = held.pop(job.job_id)
            free.append(slot)
            yield group, job


def _start(group: "dict[int, Cell]", slot: str, folder: Path) -> "Job":
    from submitit.core.utils import environment_variables
    from submitit.local.local import LocalExecutor

    executor = LocalExecutor(folder, max_num_timeout=0)
    executor.update_parameters(timeout_min=NO_TIME_LIMIT_MIN, tasks_per_node=1, gpus_per_node=1, stderr_to_stdout=True)
    executor.parameters["visible_gpus"] = [slot]  # update_parameters takes numbers only; a GPU may have a UUID
    with environment_variables(PYTHONPATH=PYTHON_PATH, PYTHONSAFEPATH="1"):
        return executor.submit(LocalGroupJob(group))
