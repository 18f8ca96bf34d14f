"""The launchers that run groups as jobs, without a cluster: what they submit, refuse, and tell of jobs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from hydra.utils import instantiate
from omegaconf import DictConfig

from cab_attention import SnapKV
from experiments.longbench_qa import in_process
from experiments.longbench_qa.cell import run_cells
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.schema import register_schema
from hydra_plugins.hydra_slurm_launcher import jobs_launcher
from hydra_plugins.hydra_slurm_launcher.array_task_launcher import ArrayTaskLauncher
from hydra_plugins.hydra_slurm_launcher.group_job import RequeuedGroupJob
from hydra_plugins.hydra_slurm_launcher.slurm_launcher import SlurmLauncher
from hydra_plugins.hydra_slurm_launcher.submitit_local_launcher import SubmititLocalLauncher
from tests.experiments.cells import MODEL, demo_cell

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "experiments" / "longbench_qa" / "runner.py"


def config(*overrides: str) -> DictConfig:
    register_schema()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def launcher(*overrides: str) -> Any:
    return instantiate(config(*overrides).hydra.launcher)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with an srun that is there and an sbatch that takes every job."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name, line in (("srun", ""), ("sbatch", "echo Submitted batch job 7")):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return folder


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> dict:
    found: dict = {}
    monkeypatch.setattr(in_process, "_finished", found)
    return found


def test_what_sbatch_gets(tmp_path: Path, commands: Path):
    options = ["partition=gpu", "account=a", "qos=q", "timeout_min=90", "gpus=2", "cpus=6", "mem_gb=1.5"]
    options += ["array_parallelism=1", "setup=[module load cuda,echo ready]"]
    overrides = [f"hydra.launcher.{option}" for option in options]
    slurm = launcher("hydra/launcher=slurm", *overrides, "+hydra.launcher.parameters.constraint=h100")
    slurm.check()
    jobs = slurm.executor(tmp_path / "logs").submit_array(
        [RequeuedGroupJob({number: demo_cell(tmp_path)}) for number in (3, 5)]
    )
    assert [job.job_id for job in jobs] == ["7_0", "7_1"]
    assert [list(job.submission().function.cells) for job in jobs] == [[3], [5]]
    lines = (tmp_path / "logs" / "7_submission.sh").read_text().splitlines()
    for wanted in (
        *("partition=gpu", "account=a", "qos=q", "time=90", "gpus-per-node=2", "cpus-per-task=6", "mem=1536M"),
        *("array=0-1%1", "constraint=h100", "signal=USR2@120", "requeue", f"output={tmp_path}/logs/%A_%a_0_log.out"),
    ):
        assert f"#SBATCH --{wanted}" in lines
    [path_line] = [number for number, line in enumerate(lines) if line.startswith("export PYTHONPATH=")]
    assert lines[path_line - 2 : path_line] == ["module load cuda", "echo ready"]
    assert lines[path_line].startswith(f"export PYTHONPATH={ROOT}")
    assert lines[path_line].endswith(" PYTHONSAFEPATH=1")


def test_a_job_is_started_again_as_it_was(tmp_path: Path, commands: Path):
    [job] = (
        launcher("hydra/launcher=slurm").executor(tmp_path).submit_array([RequeuedGroupJob({4: demo_cell(tmp_path)})])
    )
    submission = job.submission()
    assert submission._timeout_countdown == 10
    assert submission._checkpoint_function().function.cells == {4: demo_cell(tmp_path)}


@pytest.mark.parametrize("override", ["gpus=many", "partitoin=gpu", "setup=3"])
def test_options_are_typed(override: str):
    with pytest.raises(ConfigCompositionException):
        config("hydra/launcher=slurm", f"hydra.launcher.{override}")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["hydra/launcher=slurm", "hydra.launcher.timeout_min=0"], "hydra.launcher.timeout_min >= 1; it is 0"),
        (["hydra/launcher=slurm", "hydra.launcher.gpus=-1"], "hydra.launcher.gpus >= 0; it is -1"),
        (["hydra/launcher=submitit_local", "hydra.launcher.processes=0"], "hydra.launcher.processes >= 1; it is 0"),
        (["hydra/launcher=submitit_local"], "hydra.launcher.processes=N: there is no GPU here to count"),
    ],
)
def test_a_wrong_option_is_one_line(
    overrides: list[str], line: str, commands: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    name = overrides[0].removeprefix("hydra/launcher=")
    assert refusal(overrides, capsys) == f"error: hydra/launcher={name} needs {line}\n"


def test_without_slurm_or_submitit_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setenv("PATH", "/nowhere")
    assert "needs Slurm's sbatch, which is not on PATH" in refusal(["hydra/launcher=slurm"], capsys)
    monkeypatch.setattr(jobs_launcher, "find_spec", lambda name: None)
    for name in ("slurm", "submitit_local"):
        told = refusal([f"hydra/launcher={name}"], capsys)
        assert told == (
            f"error: hydra/launcher={name} needs submitit, which is not installed: pip install 'cab-attention[slurm]'\n"
        )


def refusal(overrides: list[str], capsys: pytest.CaptureFixture) -> str:
    composed = config(*overrides)
    with pytest.raises(SystemExit) as ended:
        instantiate(composed.hydra.launcher).setup(hydra_context=None, task_function=None, config=composed)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_a_job_that_sbatch_refuses_is_one_line(tmp_path: Path, commands: Path, capsys: pytest.CaptureFixture):
    (commands / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: gpuu' >&2\nexit 1\n")
    with pytest.raises(SystemExit) as ended:
        list(launcher("hydra/launcher=slurm").run_groups([{0: demo_cell(tmp_path)}]))
    assert ended.value.code == 2
    reason = "sbatch: error: invalid partition: gpuu"
    assert capsys.readouterr().err.splitlines() == [reason, "error: sbatch refused the jobs, for the reason above"]


@pytest.mark.parametrize(
    ("visible", "count", "processes", "slots"),
    [
        (None, 3, None, ["0", "1", "2"]),
        (None, 3, 2, ["0", "1"]),
        ("5,GPU-6b,7", 3, None, ["5", "GPU-6b", "7"]),
        ("", 0, 4, ["", "", "", ""]),
    ],
)
def test_a_process_a_gpu(
    visible: str | None, count: int, processes: int | None, slots: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert SubmititLocalLauncher(processes, None).slots() == slots
    if count:
        with pytest.raises(ValueError, match=r"from 1 to 3, the GPUs here; it is 4"):
            SubmititLocalLauncher(4, None).slots()


def test_a_launcher_of_the_same_name_does_not_take_its_place():
    """hydra-submitit-launcher has one, which runs each cell by itself."""
    ConfigStore.instance().store(group="hydra/launcher", name="submitit_local", node={"_target_": "another"})
    assert config("hydra/launcher=submitit_local").hydra.launcher._target_.endswith(".SubmititLocalLauncher")


class EndedJobs(SlurmLauncher):
    """Jobs that have ended, as `state` and `result` say; result None: there is none."""

    def __init__(self, folder: Path, state: str, result: dict | None) -> None:
        super().__init__()
        paths = SimpleNamespace(stdout=folder / "9_log.out", result_pickle=folder / "9_result.pkl")
        if result is not None:
            paths.result_pickle.touch()
        self.job = SimpleNamespace(job_id="9", state=state, paths=paths, result=lambda: result)

    def ended_jobs(self, together: Any, folder: Path, going: Any) -> Iterator:
        yield from ((group, self.job) for group in together)


def test_each_cells_result_is_told_from_its_records(tmp_path: Path, finished: dict):
    cells = {2: demo_cell(tmp_path), 3: demo_cell(tmp_path, method=SnapKV(32))}
    metrics = run_cells([cells[2]], ModelWrapper(MODEL))
    told = dict(EndedJobs(tmp_path, "COMPLETED", {2: None, 3: "no room"}).run_groups([cells]))
    assert told[2] == metrics[0]
    assert str(told[3]) == "no room"
    assert finished == {2: (cells[2], told[2])}


def test_a_job_that_died_is_told_with_its_log_and_its_samples_are_counted(tmp_path: Path, finished: dict):
    cell = demo_cell(tmp_path)
    run_cells([cell], ModelWrapper(MODEL))
    path = cell.folder / "metrics.json"  # as it was when the job began
    path.write_text(
        re.sub(r'"status": "complete"', '"status": "incomplete"', path.read_text()).replace('"n": 3', '"n": 0')
    )
    lines = (cell.folder / "predictions.jsonl").read_text().splitlines(keepends=True)
    (cell.folder / "predictions.jsonl").write_text("".join(lines[:2]))
    [(number, error)] = EndedJobs(tmp_path, "NODE_FAIL", None).run_groups([{6: cell}])
    assert (number, str(error)) == (6, f"its job 9 ended without a result (NODE_FAIL): see {tmp_path}/9_log.out")
    assert (finished[6][1]["n"], finished[6][1]["status"]) == (2, "incomplete")


def test_a_group_as_a_job_says_what_went_wrong_with_each_cell(tmp_path: Path, finished: dict):
    job = RequeuedGroupJob({0: demo_cell(tmp_path), 1: demo_cell(tmp_path, method=SnapKV(32))})
    folder = job.cells[1].folder
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").touch()
    told = cloudpickle.loads(cloudpickle.dumps(job))()
    assert told[0] is None
    assert "not a cell of this harness" in told[1]
    assert list(finished) == [0]


def test_an_array_task_runs_its_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict):
    groups = [
        {0: demo_cell(tmp_path)},
        {1: demo_cell(tmp_path, truncate="left"), 2: demo_cell(tmp_path, truncate="right")},
    ]
    ran: list = []
    monkeypatch.setattr(in_process, "run_together", lambda group: ran.append(group) or {key: {} for key in group})
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    task_launcher = launcher("hydra/launcher=array_task", "hydra.launcher.tasks=2")
    assert dict(task_launcher.run_groups(task_launcher.own_groups(groups))) == {1: {}, 2: {}}
    assert ran == [groups[1]]
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    for task, tasks in ((None, None), (2, None), (-1, None), (1, 3)):
        with pytest.raises(SystemExit):
            ArrayTaskLauncher(task, tasks).own_groups(groups)
    assert len(ran) == 1


@pytest.mark.slow
def test_jobs_on_this_machine_outlive_their_launcher_and_keep_a_second_one_out(tmp_path: Path):
    sweep = ["-m", "method=h2o,snapkv", "budget=32", "truncate=middle,left,right", "model.max_length=300"]
    sweep += ["max_samples=10", "wandb.mode=disabled"]
    jobs = ["hydra/launcher=submitit_local", "hydra.launcher.processes=2"]
    log = tmp_path / "log"

    def start(name: str, *overrides: str) -> subprocess.Popen:
        command = [sys.executable, str(RUNNER), *sweep, f"output_dir={tmp_path / name}", *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as file:  # not a pipe, which the jobs would hold open
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)

    first = start("out", *jobs)
    while len(list(tmp_path.rglob("predictions.jsonl"))) < 4:
        assert first.poll() is None, log.read_text()
        time.sleep(0.02)
    holders = {int(path.read_text().split()[1]) for path in tmp_path.rglob(".lock")}
    assert len(holders) == 2
    for holder in holders:
        os.kill(holder, signal.SIGSTOP)
    try:
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=20) == 128 + signal.SIGTERM
        last = log.read_text().splitlines()[-1]
        assert re.match(r"interrupted: 2 jobs had not ended \(\d+ \d+\): they go on, ", last)

        assert start("out").wait(timeout=240) == 1
        assert [log.read_text().count(f"is being written by process {holder} on") >= 2 for holder in holders] == [
            True
        ] * 2
        assert statuses(tmp_path) == ["complete"] * 2 + ["incomplete"] * 4
    finally:
        for holder in holders:
            os.kill(holder, signal.SIGCONT)
    until = time.monotonic() + 240
    while statuses(tmp_path) != ["complete"] * 6:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert start("undisturbed").wait(timeout=240) == 0
    assert answers(tmp_path / "out") == answers(tmp_path / "undisturbed")
    assert [len(samples) for samples in answers(tmp_path / "out").values()] == [10] * 6


def statuses(folder: Path) -> list[str]:
    return sorted(json.loads(path.read_text())["status"] for path in folder.rglob("metrics.json"))


def answers(folder: Path) -> dict[str, list[tuple]]:
    found = {}
    for path in sorted(folder.rglob("predictions.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(folder))] = [(s["id"], s["prediction"], s["score"], s["error"]) for s in samples]
    return found
