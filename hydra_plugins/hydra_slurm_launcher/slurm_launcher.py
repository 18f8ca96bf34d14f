"""The launcher `slurm`: the groups of a sweep as a job array, each job a group on one GPU."""

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore

from hydra_plugins.hydra_slurm_launcher.group_job import PYTHON_PATH, RequeuedGroupJob
from hydra_plugins.hydra_slurm_launcher.jobs_launcher import JobsLauncher, wait_for_one

if TYPE_CHECKING:
    from submitit import Job
    from submitit.slurm.slurm import SlurmExecutor

    from experiments.longbench_qa.config import Cell


@dataclass
class SlurmLauncherConf:
    """`hydra/launcher=slurm`; the options are `hydra.launcher.KEY=VALUE`."""

    _target_: str = "hydra_plugins.hydra_slurm_launcher.slurm_launcher.SlurmLauncher"
    _convert_: str = "all"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: int = 240
    signal_delay_s: int = 120  # this long before the time is up a job closes its records and is requeued
    max_num_timeout: int = 10  # how often a group whose time is up is started again
    gpus: int = 1  # a job's; a group uses one. 0 asks for none
    cpus: int = 4
    mem_gb: float = 32
    array_parallelism: int = 16  # jobs at a time
    setup: list[str] = field(default_factory=list)  # shell lines before the job's Python, as module load cuda
    folder: str | None = None  # which gets one of logs a sweep; null: OUTPUT_DIR/jobs
    parameters: dict[str, Any] = field(default_factory=dict)  # of sbatch: +hydra.launcher.parameters.constraint=h100


ConfigStore.instance().store(group="hydra/launcher", name="slurm", node=SlurmLauncherConf)
LEAST = {"timeout_min": 1, "signal_delay_s": 0, "max_num_timeout": 0, "gpus": 0, "cpus": 1, "array_parallelism": 1}


class SlurmLauncher(JobsLauncher):
    """Submits the groups with sbatch, through submitit, and waits for them."""

    name = "slurm"
    how_to_stop = "they go on, scancel ends them"

    def __init__(self, **options: Any) -> None:
        self.options = SlurmLauncherConf(**options)

    @property
    def folder(self) -> str | None:
        """Where each sweep has a folder, which every node must see; None: OUTPUT_DIR/jobs."""
        return self.options.folder

    def check(self) -> None:
        """Raise ValueError where there is no Slurm, and for an option that cannot be."""
        for command in ("sbatch", "srun"):
            if shutil.which(command) is None:
                raise ValueError(f"Slurm's {command}, which is not on PATH (here: hydra/launcher=submitit_local)")
        for key, least in LEAST.items():
            if (value := asdict(self.options)[key]) < least:
                raise ValueError(f"hydra.launcher.{key} >= {least}; it is {value}")

    def ended_jobs(
        self, together: "Sequence[dict[int, Cell]]", folder: Path, going: "dict[str, Job]"
    ) -> "Iterator[tuple[dict[int, Cell], Job]]":
        """Submit all groups as one array. A job that cannot be submitted ends the sweep before anything has run."""
        from submitit.core.utils import FailedJobError

        try:
            jobs = self.executor(folder).submit_array([RequeuedGroupJob(group) for group in together])
        except FailedJobError:
            print("error: sbatch refused the jobs, for the reason above", file=sys.stderr)
            sys.exit(2)
        groups = {job.job_id: group for job, group in zip(jobs, together, strict=True)}
        going |= {job.job_id: job for job in jobs}
        print(f"Submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; logs: {folder}", flush=True)
        while going:
            job = wait_for_one(going, jobs[0].watcher.update)
            yield groups[job.job_id], job

    def executor(self, folder: Path) -> "SlurmExecutor":
        """submitit's executor with the options of this launcher."""
        from submitit.slurm.slurm import SlurmExecutor

        options = self.options
        executor = SlurmExecutor(folder, max_num_timeout=options.max_num_timeout)
        executor.update_parameters(
            job_name="longbench_qa",
            partition=options.partition,
            account=options.account,
            qos=options.qos,
            time=options.timeout_min,
            signal_delay_s=options.signal_delay_s,
            gpus_per_node=options.gpus or None,
            cpus_per_task=options.cpus,
            mem=f"{round(options.mem_gb * 1024)}M",
            array_parallelism=options.array_parallelism,
            setup=[*options.setup, f"export PYTHONPATH={shlex.quote(PYTHON_PATH)} PYTHONSAFEPATH=1"],
            srun_args=[f"--cpus-per-task={options.cpus}"],  # srun does not take it over from sbatch
            stderr_to_stdout=True,
            # Slurm itself starts a job again that it preempted or whose node failed.
            additional_parameters={"requeue": True, **options.parameters},
        )
        return executor
