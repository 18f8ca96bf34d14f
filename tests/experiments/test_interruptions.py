"""Real processes: killed, interrupted, out of disk, in each other's way. No sample is lost, doubled or moved."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parents[2] / "experiments" / "longbench_qa" / "runner.py"
CELL = Path("demo,max_length=600") / "cab" / "b48" / "demo_qa"
COMMAND = ["method=cab", "budget=48", "model.max_length=600", "max_samples=20", "wandb.mode=disabled"]

pytestmark = pytest.mark.slow


def start(folder: Path, *overrides: str, before: str = "") -> subprocess.Popen:
    """The runner as a process; `before` is Python that it runs first."""
    arguments = [str(RUNNER), *COMMAND, f"output_dir={folder}", *overrides]
    program = f"import runpy, sys\n{before}\nsys.argv = {arguments!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program] if before else [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines(folder: Path) -> list[str]:
    path = folder / CELL / "predictions.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def results(folder: Path) -> list[tuple]:
    samples = [json.loads(line) for line in lines(folder)]
    return [(s["id"], s["prediction"], s["score"], s["kept_tokens"], s["answer_kept"], s["error"]) for s in samples]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    for _ in range(6000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.01)
    raise AssertionError("nothing happened within a minute")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert len(results(folder)) == 20
    return results(folder)


def test_kill_9_loses_at_most_the_sample_in_flight(tmp_path: Path, undisturbed: list[tuple]):
    generator = random.Random(0)
    for _ in range(4):
        process, had = start(tmp_path), len(lines(tmp_path))
        wanted = had + 1 + generator.randrange(3)
        wait_for(lambda wanted=wanted: len(lines(tmp_path)) >= wanted, process)
        time.sleep(generator.random() * 0.2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert len(lines(tmp_path)) >= wanted
        assert json.loads((tmp_path / CELL / "metrics.json").read_text())["status"] == "incomplete"
    assert start(tmp_path).communicate(timeout=240)
    assert results(tmp_path) == undisturbed
    metrics = json.loads((tmp_path / CELL / "metrics.json").read_text())
    assert (metrics["n"], metrics["status"]) == (20, "complete")
    assert len(metrics["environments"]) == 1
    assert metrics["score"] == sum(sample[2] for sample in undisturbed) / 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_closes_the_records_and_says_how_to_go_on(tmp_path: Path, number: int):
    process = start(tmp_path)
    wait_for(lambda: len(lines(tmp_path)) >= 2, process)
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - sent < 2
    assert process.returncode == 128 + number
    done = len(results(tmp_path))
    assert f"interrupted: {done} of 20 samples" in errors
    assert "the same command" in errors
    metrics = json.loads((tmp_path / CELL / "metrics.json").read_text())
    assert (metrics["n"], metrics["status"]) == (done, "incomplete")


def test_a_signal_closes_every_cell_of_a_group(tmp_path: Path, undisturbed: list[tuple]):
    """The cells share their prefills; none of them loses a sample, and the same command goes on with all."""
    sweep = ("hydra.mode=MULTIRUN", "budget=48,64,96")
    process = start(tmp_path, *sweep)
    wait_for(lambda: len(lines(tmp_path)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    folders = [path.parent for path in tmp_path.rglob("predictions.jsonl")]
    assert len(folders) == 3
    for folder in folders:
        done = len((folder / "predictions.jsonl").read_text().splitlines())
        assert f"interrupted: {done} of 20 samples of {folder}" in errors
        metrics = json.loads((folder / "metrics.json").read_text())
        assert (metrics["n"], metrics["status"]) == (done, "incomplete")
    assert start(tmp_path, *sweep).wait(timeout=240) == 0
    for folder in folders:
        assert json.loads((folder / "metrics.json").read_text())["status"] == "complete"
    assert results(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_groups_says_how_to_go_on(tmp_path: Path, number: int):
    """Between cells nothing is open; the groups before are complete, those after untouched."""
    pause = (
        "import pathlib, time, experiments.longbench_qa.in_process as in_process\n"
        "run_together = in_process.run_together\n"
        "def pausing(cells):\n"
        "    if 'after_context' in [cell.compress for cell in cells.values()]:\n"
        "        pathlib.Path('between').touch()\n"
        "        time.sleep(60)\n"
        "    return run_together(cells)\n"
        "in_process.run_together = pausing"
    )
    sweep = ("hydra.mode=MULTIRUN", "budget=48,64", "compress=after_prompt,after_context", "max_samples=2")
    process = start(tmp_path, *sweep, before=f"sys.path.insert(0, {str(RUNNER.parents[2])!r})\n{pause}")
    wait_for((tmp_path / "between").exists, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1] == "interrupted: the same command goes on from what is recorded"
    assert "Traceback" not in errors
    done = [json.loads(path.read_text())["status"] for path in tmp_path.rglob("metrics.json")]
    assert done == ["complete", "complete"]
    assert not list(tmp_path.rglob("*after_context*"))
    assert start(tmp_path, *sweep).wait(timeout=240) == 0
    assert len(list(tmp_path.rglob("metrics.json"))) == 4


def test_handlers_of_a_job_runner_have_the_last_word_after_the_records_are_closed(tmp_path: Path):
    """As submitit sets them in a Slurm job: SIGCONT and SIGTERM pass, SIGUSR2 starts the job again."""
    handlers = (
        "import signal\n"
        "def requeue(*_):\n"
        "    print('requeued', file=sys.stderr, flush=True)\n"
        "    sys.exit(77)\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('bypassed', file=sys.stderr, flush=True))\n"
        "signal.signal(signal.SIGCONT, lambda *_: None)\n"
        "signal.signal(signal.SIGUSR2, requeue)"
    )
    process = start(tmp_path, "max_samples=60", before=handlers)
    wait_for(lambda: len(lines(tmp_path)) >= 1, process)
    process.send_signal(signal.SIGCONT)
    had = len(lines(tmp_path))
    wait_for(lambda: len(lines(tmp_path)) > had, process)
    process.send_signal(signal.SIGTERM)
    metrics = tmp_path / CELL / "metrics.json"
    assert process.poll() is None
    wait_for(lambda: json.loads(metrics.read_text())["n"] > 0, process)
    had = lines(tmp_path)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 77
    assert [line.split(":")[0] for line in errors.splitlines()[-3:]] == ["interrupted", "bypassed", "requeued"]
    assert lines(tmp_path) == had
    assert json.loads(metrics.read_text())["n"] == len(had) < 60


def test_a_signal_is_heard_while_a_computation_holds_the_main_thread(tmp_path: Path):
    """A C call that lets go of the interpreter lock but does not return, as a wait for a GPU is."""
    hang = (
        "import hashlib, experiments.longbench_qa.cell as cell\n"
        "generate = cell.ModelWrapper._generate\n"
        "calls = []\n"
        "def hanging(*args, **kwargs):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        hashlib.pbkdf2_hmac('sha256', b'', b'', 100_000_000)\n"
        "    return generate(*args, **kwargs)\n"
        "cell.ModelWrapper._generate = hanging"
    )
    root = RUNNER.parents[2]
    process = start(tmp_path, before=f"sys.path.insert(0, {str(root)!r})\n{hang}")
    wait_for(lambda: len(lines(tmp_path)) == 2, process)
    time.sleep(1)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=40)
    assert time.monotonic() - sent < 2
    assert process.returncode == 128 + signal.SIGTERM
    assert "interrupted: 2 of 20 samples" in errors


def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path: Path, undisturbed: list[tuple]):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"
    process = start(tmp_path, before=limit)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith("error: cannot write to")
    assert "intact" in errors
    assert "Traceback" not in errors
    done = results(tmp_path)
    assert 2 <= len(done) < 20
    assert done == undisturbed[: len(done)]
    assert start(tmp_path).wait(timeout=240) == 0
    assert results(tmp_path) == undisturbed


def test_two_processes_on_one_cell(tmp_path: Path, undisturbed: list[tuple]):
    first = start(tmp_path)
    wait_for(lambda: len(lines(tmp_path)) >= 1, first)
    second = start(tmp_path)
    _, errors = second.communicate(timeout=60)
    if first.poll() is None:
        assert second.returncode == 2
        assert f"is being written by process {first.pid} on" in errors.splitlines()[-1]
    assert first.wait(timeout=240) == 0
    assert results(tmp_path) == undisturbed
