"""A whole sweep killed with SIGKILL twenty times and started again: every cell ends as if nothing had been."""

import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parents[2] / "experiments" / "longbench_qa" / "runner.py"
N = 8
SWEEP = [
    *("-m", "method=h2o,snapkv,tova", "budget=32,64", "compress=after_prompt,after_context"),
    *("model.max_length=300", f"max_samples={N}", "wandb.mode=disabled"),
]
CELLS = 12
KILLS = 20
# What a start of the runner imports, which takes seconds and touches no record: done once, and forked for each run.
IMPORTED = ["experiments.longbench_qa.in_process", "experiments.longbench_qa.plan", "hydra", "transformers"]

pytestmark = pytest.mark.slow


def sweep(folder: Path) -> None:
    """The runner in this process."""
    os.chdir(folder)
    sys.stdout = sys.stderr = (folder / "log").open("a")
    sys.argv = [str(RUNNER), *SWEEP, f"output_dir={folder / 'out'}"]
    runpy.run_path(str(RUNNER), run_name="__main__")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    (first := context.Process(target=int)).start()
    first.join()  # the imports are done now
    return context


def start(processes: multiprocessing.context.BaseContext, folder: Path) -> BaseProcess:
    process = processes.Process(target=sweep, args=(folder,))  # type: ignore[attr-defined]
    process.start()
    return process


def lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("predictions.jsonl"))


def records(folder: Path) -> dict[str, list[tuple]]:
    found = {}
    for path in sorted(folder.rglob("predictions.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.parent.relative_to(folder))] = [
            (s["id"], s["prediction"], s["score"], s["kept_tokens"], s["answer_kept"], s["error"]) for s in samples
        ]
    return found


def test_a_sweep_killed_twenty_times_ends_as_an_undisturbed_one(tmp_path: Path, processes):
    calm, disturbed = tmp_path / "calm", tmp_path / "disturbed"
    calm.mkdir()
    disturbed.mkdir()
    first = start(processes, calm)
    started = time.monotonic()
    while not lines(calm):
        assert first.is_alive(), (calm / "log").read_text()
        time.sleep(0.01)
    to_first_record = time.monotonic() - started
    first.join(240)
    assert first.exitcode == 0, (calm / "log").read_text()
    expected = records(calm)
    assert [len(samples) for samples in expected.values()] == [N] * CELLS

    # Moments: seven before anything new is recorded (composing, opening, loading), the others when so many records are
    # there: spread over both groups, and where the first one ends (metrics are written, the second one is opened).
    generator = random.Random(0)
    total, half = CELLS * N, CELLS * N // 2
    moments = sorted([*generator.sample(range(1, total - 10), KILLS - 10), half - 1, half, half])
    for _ in range(KILLS - len(moments)):
        moments.insert(generator.randrange(len(moments)), 0)
    stages = set()
    for wanted in moments:
        before = lines(disturbed)
        process = start(processes, disturbed)
        if wanted > before:
            while lines(disturbed) < wanted:
                assert process.is_alive(), (disturbed / "log").read_text()
                time.sleep(0.002)
            time.sleep(generator.random() * 0.02)
        else:
            until = time.monotonic() + generator.random() * to_first_record
            while time.monotonic() < until and lines(disturbed) == before:
                time.sleep(0.002)
        process.kill()
        process.join(20)
        assert process.exitcode == -signal.SIGKILL
        after = lines(disturbed)
        stages.add("before a record" if after == before else "first group" if after < half else "second group")
    assert stages == {"before a record", "first group", "second group"}
    assert before < total

    last = start(processes, disturbed)
    last.join(240)
    assert last.exitcode == 0, (disturbed / "log").read_text()
    assert records(disturbed) == expected
    for path in disturbed.rglob("metrics.json"):
        metrics, same = json.loads(path.read_text()), json.loads((calm / path.relative_to(disturbed)).read_text())
        assert (metrics["status"], metrics["n"], metrics["n_failed"]) == ("complete", N, 0)
        assert metrics["score"] == same["score"]
    assert len(list(disturbed.rglob("metrics.json"))) == CELLS
