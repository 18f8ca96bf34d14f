"""Real memory of a real GPU: what is measured, and running out of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cab_attention import H2O, Full, SnapKV
from experiments.longbench_qa import model_wrapper
from experiments.longbench_qa.cell import run_cell, run_cells
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.schema import DatasetConfig, ModelConfig
from tests.experiments.cells import demo_cell, recorded

pytestmark = pytest.mark.gpu
MODEL = ModelConfig(name="tiny", kind="tiny", device="cuda")


@pytest.fixture
def uneven_rows(tmp_path: Path) -> Path:
    """Three rows, the middle one of 4000 tokens, the others of 200."""
    row = {"input": "q", "answers": ["a"], "length": 1, "dataset": "hotpotqa", "language": "en", "all_classes": None}
    rows = [row | {"_id": str(i), "context": "word " * n} for i, n in enumerate((40, 800, 40))]
    (tmp_path / "hotpotqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prompts.json").write_text('{"hotpotqa": "{context} {input}"}')
    return tmp_path


def test_out_of_memory_fails_one_sample_and_frees_it(uneven_rows: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model_wrapper, "refuse_eager_that_cannot_fit", lambda *args: None)
    cell = demo_cell(
        uneven_rows,
        model=MODEL,
        attention="eager",
        dataset=DatasetConfig(name="hotpotqa", max_new_tokens=4),
        data_dir=str(uneven_rows),
        prompts="file",
        prompts_file=str(uneven_rows / "prompts.json"),
    )
    model = ModelWrapper(MODEL).load()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    limit = before + 2**29  # eager wants about 1.7 GiB for the long row
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        metrics = run_cell(cell, model)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    samples = recorded(cell)
    assert [sample["error"] is None for sample in samples] == [True, False, True]
    assert "OutOfMemoryError" in samples[1]["error"]
    assert (metrics["n"], metrics["n_failed"]) == (2, 1)
    assert samples[0]["prediction"] == samples[2]["prediction"]
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_peaks_are_over_the_weights_and_eager_needs_more(uneven_rows: Path):
    cells = [
        demo_cell(
            uneven_rows / attention,
            model=MODEL,
            attention=attention,
            dataset=DatasetConfig(name="hotpotqa", max_new_tokens=4),
            data_dir=str(uneven_rows),
            prompts="file",
            prompts_file=str(uneven_rows / "prompts.json"),
        )
        for attention in ("cab", "eager")
    ]
    model = ModelWrapper(MODEL)
    for cell in cells:
        run_cell(replace(cell, max_samples=3), model)
    ours, eager = (recorded(cell) for cell in cells)
    for sample in ours + eager:
        assert 0 < sample["decode_peak_bytes"] <= sample["prefill_peak_bytes"]
        assert sample["total_peak_bytes"] == sample["weights_bytes"] + sample["prefill_peak_bytes"]
    assert eager[1]["prefill_peak_bytes"] > 2 * ours[1]["prefill_peak_bytes"]


def test_the_decode_peaks_of_a_shared_prefill_leave_the_other_caches_out(uneven_rows: Path):
    model = ModelWrapper(MODEL)
    shared, alone = (
        [
            demo_cell(
                uneven_rows / name,
                model=MODEL,
                method=method,
                dataset=DatasetConfig(name="hotpotqa", max_new_tokens=4),
                data_dir=str(uneven_rows),
                prompts="file",
                prompts_file=str(uneven_rows / "prompts.json"),
            )
            for method in (Full(), H2O(64), SnapKV(256), H2O(0.5))
        ]
        for name in ("shared", "alone")
    )
    run_cells(shared, model)
    for cell, separate in zip(shared, alone, strict=True):
        run_cell(separate, model)
        for sample, expected in zip(recorded(cell), recorded(separate), strict=True):
            assert sample["prediction"] == expected["prediction"]
            assert sample["prefill_peak_bytes"] is sample["total_peak_bytes"] is None
            assert abs(sample["decode_peak_bytes"] - expected["decode_peak_bytes"]) <= 2**20
