"""The study under torch's launcher: two processes on the CPU hold one model."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from transformers.utils import is_accelerate_available

from experiments.longbench_qa import models, ranks
from experiments.longbench_qa.generation import Generation, of_all_ranks
from experiments.longbench_qa.schema import ModelConfig
from tests.tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]
needs_accelerate = pytest.mark.skipif(not is_accelerate_available(), reason="needs accelerate")
FAILING = Path(__file__).with_name("failing_ranks.py")
TIMES = ("prefill_ms", "decode_ms_per_token")


def launch(n_ranks: int, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"] if n_ranks > 1 else []
    command, environment = [sys.executable, *launcher, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.slow
@needs_accelerate
@pytest.mark.skipif(transformers.__version__ < "5.23", reason="transformers 5.17 divides no odd vocabulary: the demo's")
def test_records_are_those_of_one_process(tmp_path: Path):
    """Of cells from shared prefills, and of cells by themselves; nothing is done twice."""
    runner = str(ROOT / "experiments/longbench_qa/runner.py")
    command = [runner, "-m", "dataset=demo_qa_512", "max_samples=2", "budget=24", "wandb.mode=disabled"]
    command += ["method=full,adakv,tova,random", "prefill_chunk=null,300", f"hydra.sweep.dir={tmp_path}"]
    alone = launch(1, *command, f"output_dir={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    together = launch(2, *command, f"output_dir={tmp_path}/together", "model.tp_plan=auto")
    assert together.returncode == 0, together.stderr
    assert together.stdout.count("LongBench QA") == 1  # the table
    files = sorted(path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("predictions.jsonl"))
    assert len(files) == 8
    for file in files:
        samples = [
            [json.loads(line) for line in (tmp_path / run / file).read_text().splitlines()]
            for run in ("alone", "together")
        ]
        assert len(samples[0]) == 2 and all(sample["error"] is None for sample in samples[0])
        for one, other in zip(*samples, strict=True):
            for key in one.keys() - TIMES:
                assert other[key] == pytest.approx(one[key]) if isinstance(one[key], float) else other[key] == one[key]
        metrics = json.loads((tmp_path / "together" / file).with_name("metrics.json").read_text())
        assert metrics["model"]["ranks"] == 2


@pytest.mark.slow
def test_ranks_go_on_after_what_all_of_them_know_of():
    run = launch(2, str(FAILING), "alike", "rank 1 after", "nothing", timeout=120)
    assert run.stdout.splitlines() == [
        "alike: ValueError: no room",
        "rank 1 after: RuntimeError: rank 1 failed: MemoryError: no room",
        "nothing: done",
    ]
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "first_line"),
    [
        ("rank 0 before", "rank 0 before: OutOfStepError: rank 0 waited for the others in vain, having failed itself"),
        ("rank 1 before", None),
        ("differently", "differently: OutOfStepError: the ranks failed in different ways"),
    ],
)
def test_ranks_that_may_be_at_different_places_end(how: str, first_line: str | None):
    """Soon, with an error: the next computation of one would meet what another still waits for."""
    run = launch(2, str(FAILING), how, "nothing", timeout=120)
    assert run.returncode != 0
    assert first_line is None or run.stdout.startswith(first_line)
    assert "nothing: done" not in run.stdout
    assert "in vain" in run.stderr or "different ways" in run.stderr


def part(rank: int, **changes: object) -> Generation:
    generation = Generation(
        text="a",
        prompt_tokens=9,
        generated_tokens=2,
        truncated=False,
        compressed_tokens=9,
        budget_tokens=4,
        kept_tokens=4.0,
        kept_by_layer=[3.0 + rank, 5.0 - rank],
        answer_kept=0.5,
        answer_kept_heads=[[0.0, 1.0], [0.25 * rank, 0.5]],
        effective={},
        cache_bytes=100,
        bookkeeping_bytes=10,
        prefill_shared=False,
        prefill_ms=1.0 + rank,
        decode_ms_per_token=1.0,
        weights_bytes=1000 + rank,
        prefill_peak_bytes=50 - rank,
        decode_peak_bytes=20,
        total_peak_bytes=1050,
    )
    return replace(generation, **changes)


def test_an_answer_of_all_ranks():
    """All heads, the whole cache's bytes, the memory of the rank that needs most."""
    assert of_all_ranks([part(0)]) is not None
    both = of_all_ranks([part(0), part(1)])
    assert both.kept_by_layer == [3.5, 4.5] and both.kept_tokens == 4.0
    assert both.answer_kept_heads == [[0.0, 1.0, 0.0, 1.0], [0.0, 0.5, 0.25, 0.5]]
    assert both.answer_kept == pytest.approx(3.25 / 8)
    assert (both.cache_bytes, both.bookkeeping_bytes) == (200, 20)
    assert (both.weights_bytes, both.prefill_peak_bytes, both.total_peak_bytes) == (1001, 50, 1050)
    assert both.prefill_ms == 1.0
    on_cpu = dict(weights_bytes=None, prefill_peak_bytes=None, decode_peak_bytes=None, total_peak_bytes=None)
    without = of_all_ranks([part(rank, answer_kept=None, answer_kept_heads=None, **on_cpu) for rank in (0, 1)])
    assert without.answer_kept is without.answer_kept_heads is without.weights_bytes is None
    with pytest.raises(RuntimeError, match=r"different answers: \['a', 'b'\]"):
        of_all_ranks([part(0), part(1, text="b")])


@pytest.mark.parametrize(
    ("n_ranks", "places", "refusal"),
    [
        (1, {"tp_plan": "auto"}, "model.tp_plan=auto divides the model among the processes of torchrun"),
        (2, {}, "torchrun started 2 processes: allowed with model.tp_plan=auto"),
        (2, {"tp_plan": "auto"}, "model.tp_plan=auto needs the package accelerate"),
        (1, {"device_map": "auto"}, "model.device_map=auto needs the package accelerate"),
    ],
)
def test_what_spreading_needs(n_ranks: int, places: dict, refusal: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "n_ranks", lambda: n_ranks)
    monkeypatch.setattr("cab_attention.attention.is_accelerate_available", lambda: False)
    with pytest.raises(ValueError, match=refusal):
        models.load(ModelConfig(name="demo", kind="demo", **places))


def test_a_model_whose_attention_is_not_divided(monkeypatch: pytest.MonkeyPatch):
    """Its cache would be counted once a rank."""
    monkeypatch.setattr(ranks, "n_ranks", lambda: 2)
    for architecture in ("llama", "qwen2", "qwen3", "mistral"):
        models._refuse_whole_attention(tiny_model(architecture))
    with pytest.raises(ValueError, match="leaves the attention of Phi3ForCausalLM whole on every rank"):
        models._refuse_whole_attention(tiny_model("phi3"))


@needs_accelerate
def test_heads_that_the_ranks_cannot_share(monkeypatch: pytest.MonkeyPatch):
    """Refused before any weight is read."""
    monkeypatch.setattr(ranks, "n_ranks", lambda: 8)
    with pytest.raises(ValueError, match="over 8 ranks, llama has 4 KV heads"):
        models.load(ModelConfig(name="demo", kind="demo", tp_plan="auto"))
    with pytest.raises(ValueError, match="over 8 ranks, qwen2 has 28 attention heads"):
        models.load(ModelConfig(name="random", kind="random", shape="qwen2.5-7b", tp_plan="auto"))
