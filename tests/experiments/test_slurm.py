"""A sweep through a real Slurm: a job killed, a job at its time limit, and the sweep started again."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "experiments" / "longbench_qa" / "runner.py"
N = 20
# Three groups of two cells. `left` is killed, `right` reaches its time limit.
SWEEP = [
    *("method=h2o,snapkv", "budget=32", "truncate=middle,left,right"),
    *("model.max_length=300", f"max_samples={N}", "wandb.mode=disabled"),
]
# In a job's first run each record of `left` and `right` takes 4 s, so that the time limit comes in between.
SLOW = """
import os, time
fsync = os.fsync
def slow_fsync(file):
    fsync(file)
    path = os.readlink(f"/proc/self/fd/{file}")
    if "SLURM_RESTART_COUNT" not in os.environ and path.endswith("t/predictions.jsonl"):
        time.sleep(4)
if "SLURM_JOB_ID" in os.environ:
    os.fsync = slow_fsync
"""

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(autouse=True)
def cluster():
    try:
        answer = subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"needs Slurm: {error}")
    if answer.returncode != 0:
        pytest.skip(f"needs Slurm: sinfo says {answer.stderr.decode().strip()}")


def environment(folder: Path, slow: bool) -> dict[str, str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "LOGS": str(folder / "logs")}
    if slow:
        (folder / "slow").mkdir(parents=True, exist_ok=True)
        (folder / "slow" / "sitecustomize.py").write_text(SLOW)
        variables["PYTHONPATH"] = str(folder / "slow")
    return variables


def launch(folder: Path, *overrides: str, slow: bool = False) -> subprocess.Popen:
    """The sweep as a process that waits for its jobs, or (no launcher given) runs it itself."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(RUNNER), "-m", *SWEEP, f"output_dir={folder / 'out'}", *overrides]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment(folder, slow))


def submit_array(folder: Path, slow: bool) -> str:
    """The sweep as a plain job array; its job id."""
    folder.mkdir(exist_ok=True)
    command = [str(ROOT / "scripts/slurm/sweep.sh"), "--array", "demo", *SWEEP, f"output_dir={folder / 'out'}"]
    variables = environment(folder, slow) | {"SBATCH_TIMELIMIT": "2", "SBATCH_SIGNAL": "B:USR1@5"}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^submitted: job (\d+), 3 groups", done.stdout)
    assert found, done.stdout
    return found[1]


def wait_for(condition: Callable[[], bool], seconds: int) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"nothing happened within {seconds} s"
        time.sleep(0.2)


def kill_a_job_of(folder: Path) -> None:
    """SIGKILL to the process that has the group `truncate=left`, once it has recorded a sample."""
    cell = folder / "out" / "demo,max_length=300" / "h2o" / "b32" / "demo_qa,truncate=left"
    wait_for(lambda: (cell / "predictions.jsonl").exists(), 90)
    holder = re.match(r"process (\d+) on", (cell / ".lock").read_text())
    assert holder
    os.kill(int(holder[1]), signal.SIGKILL)


def records(folder: Path) -> dict[str, list[tuple]]:
    found = {}
    for path in sorted((folder / "out").rglob("predictions.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(folder))] = [
            (s["id"], s["prediction"], s["score"], s["kept_tokens"], s["answer_kept"], s["error"]) for s in samples
        ]
    return found


def states(folder: Path) -> list[str]:
    return [json.loads(path.read_text())["status"] for path in sorted((folder / "out").rglob("metrics.json"))]


def ended(job: str) -> bool:
    squeue = ["squeue", "--noheader", "--array", "--jobs", job, "--states=PENDING,RUNNING,COMPLETING,REQUEUED"]
    return not subprocess.run(squeue, capture_output=True, text=True, check=True).stdout.strip()


def test_killed_and_requeued_jobs_lose_and_double_no_sample(tmp_path: Path):
    jobs, array, undisturbed = (tmp_path / name for name in ("jobs", "array", "undisturbed"))
    slurm = ["hydra/launcher=slurm", "hydra.launcher.cpus=1"]
    first = launch(jobs, *slurm, "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=5", slow=True)
    kill_a_job_of(jobs)
    job = submit_array(array, slow=True)
    kill_a_job_of(array)
    assert launch(undisturbed).wait(timeout=600) == 0
    expected = records(undisturbed)
    assert [len(samples) for samples in expected.values()] == [N] * 6

    # The time limit: the records are closed, Slurm starts the job again after two minutes, and it goes on.
    assert first.wait(timeout=600) == 1
    told = (jobs / "log").read_text()
    died = re.findall(r"failed: its job (\d+_1) ended without a result \(FAILED\): see (.*)", told)
    assert len(died) == 2
    assert all(Path(log).is_file() for _, log in died)
    lost = re.findall(r"^incomplete, not in the table: .*truncate=left: (\d+) of", told, re.MULTILINE)
    assert len(lost) == 2
    assert sum(map(int, lost)) == sum(len(s) for name, s in records(jobs).items() if name.endswith("truncate=left"))
    table = [line.split("│") for line in told.splitlines() if line.startswith("│") and "±" in line]
    assert sorted(row[4].strip() for row in table) == ["demo_qa"] * 2 + ["demo_qa,truncate=right"] * 2
    assert {row[5].strip() for row in table} == {str(N)}
    [log] = jobs.rglob("*_2_0_log.out")
    assert f"of {N} samples of" in log.read_text()
    assert "Requeued job" in log.read_text()
    wait_for(lambda: ended(job), 600)
    assert sorted(states(array)) == ["complete"] * 4 + ["incomplete"] * 2
    log = array / "logs" / next(path.name for path in (array / "logs").iterdir() if path.name.endswith("_2.log"))
    assert "interrupted: " in log.read_text()
    assert "time is up: the task is requeued" in log.read_text()

    # Started again: what is missing is done, and nothing else.
    again = launch(jobs, *slurm)
    job = submit_array(array, slow=False)
    assert again.wait(timeout=300) == 0, (jobs / "log").read_text()
    wait_for(lambda: ended(job), 300)
    for folder in (jobs, array):
        assert records(folder) == expected
        assert states(folder) == ["complete"] * 6
