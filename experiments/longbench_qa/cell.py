"""Run one cell: every sample of its data set that has no record yet, then the metrics over all of them."""

import gc
import math
from collections.abc import Callable
from typing import Any

import torch

from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.data import Row, load_rows
from experiments.longbench_qa.metrics import score_sample
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.prompts import fill_template, load_template
from experiments.longbench_qa.records import CellRecords, environment
from experiments.longbench_qa.tracking import Tracker

MEANS = (
    "prompt_tokens",
    "generated_tokens",
    "budget_tokens",
    "kept_tokens",
    "cache_bytes",
    "bookkeeping_bytes",
    "prefill_ms",
    "decode_ms_per_token",
)
PEAKS = ("prefill_peak_bytes", "decode_peak_bytes")


def run_cell(
    cell: Cell, model: ModelWrapper, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Run a cell and return its metrics, as metrics.json has them.

    Everything that can be wrong with the request is found before the model is loaded. A sample that fails is recorded
    with its error and counts in `n_failed`. `on_progress(done, total)` is called first and after each sample.
    """
    rows = load_rows(cell.dataset.name, cell.data_dir, cell.max_samples)
    template = load_template(cell.dataset.name, cell.prompts_file)
    records = CellRecords(cell.folder, cell.identity())
    pending = [row for row in rows if row.id not in records.samples]
    if not pending:
        metrics = compute_metrics(cell, records, rows)
        records.write_metrics(metrics)
        return metrics
    model.load(force_eager_attention=cell.attention == "eager")
    tracker = Tracker(cell)
    done = len(rows) - len(pending)
    on_progress(done, len(rows))
    for row in pending:
        sample = _run_sample(cell, model, template, row)
        records.add(sample)
        done += 1
        scores = [s["score"] for s in records.samples.values() if s["error"] is None]
        tracker.log_sample(done, {"running_score": sum(scores) / len(scores)} if scores else {})
        on_progress(done, len(rows))
    metrics = compute_metrics(cell, records, rows)
    records.write_metrics(metrics)
    tracker.finish(metrics)
    return metrics


def _run_sample(cell: Cell, model: ModelWrapper, template: str, row: Row) -> dict[str, Any]:
    sample: dict[str, Any] = {"id": row.id, "prediction": None, "answers": row.answers, "score": None, "error": None}
    try:
        generation = model.generate(
            fill_template(template, row.context, row.input),
            cell.method,
            max_new_tokens=cell.dataset.max_new_tokens,
            compress=cell.compress,
            chat_template=cell.dataset.chat_template,
            stop_at_newline=cell.dataset.stop_at_newline,
            sample_id=row.id,
        )
    except Exception as error:  # one sample's failure must not take the others' results with it
        sample["error"] = f"{type(error).__name__}: {error}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return sample
    sample["prediction"] = generation.text
    sample["score"] = score_sample(cell.dataset.name, generation.text, row.answers, row.all_classes)
    return sample | {key: value for key, value in vars(generation).items() if key != "text"}


def compute_metrics(cell: Cell, records: CellRecords, rows: list[Row]) -> dict[str, Any]:
    """The cell's result over the rows asked for: failed samples are counted, never scored."""
    samples = [records.samples[row.id] for row in rows if row.id in records.samples]
    finished = [sample for sample in samples if sample["error"] is None]
    scores = [sample["score"] for sample in finished]
    n = len(scores)
    mean = sum(scores) / n if n else None
    spread = sum((score - mean) ** 2 for score in scores) if mean is not None else 0.0
    budget = cell.method.parsed_budget
    return {
        "score": mean,
        "standard_error": math.sqrt(spread / (n - 1) / n) if n > 1 else None,
        "n": n,
        "n_failed": len(samples) - n,
        "n_truncated": sum(sample["truncated"] for sample in finished),
        "status": "complete" if n == len(rows) else "incomplete",
        "budget_kind": budget.kind,
        "budget": str(budget),
        **{f"mean_{key}": _mean([sample[key] for sample in finished]) for key in MEANS},
        **{f"max_{key}": max((s[key] for s in finished if s[key] is not None), default=None) for key in PEAKS},
        "config": cell.identity() | {"seed": cell.seed, "max_samples": cell.max_samples},
        "environment": environment(),
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
