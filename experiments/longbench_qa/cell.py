"""Run one cell: every sample of its data set that has no record yet, then the metrics over all of them."""

import gc
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from experiments.longbench_qa.cell_metrics import cell_metrics
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.data import Row, load_data
from experiments.longbench_qa.environment import environment
from experiments.longbench_qa.metrics import score_sample
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.prompts import fill_template, load_prompt
from experiments.longbench_qa.records import CellRecords
from experiments.longbench_qa.tracking import Tracker


def run_cell(
    cell: Cell,
    model: ModelWrapper,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    closing: Callable[[Callable[[], None]], AbstractContextManager] = lambda close: nullcontext(),
) -> dict[str, Any]:
    """Run a cell and return its metrics, as metrics.json has them.

    Everything that can be wrong with the request is found before the model is loaded (ValueError). A sample that fails
    is recorded with its error, not scored, and counts in `n_failed`.

    Args:
        model: loaded here if there is anything to do.
        on_progress: called with (done, total) first and after each sample.
        closing: a context around the run that is given what to do if the process is told to end.
    """
    rows, data = load_data(cell.dataset.name, cell.data_dir, cell.max_samples, cell.cache_dir)
    template, prompt = load_prompt(cell.dataset.name, cell.prompts_file, cell.prompts, cell.cache_dir)
    identity = cell.identity() | {"data_sha256": data.sha256, "prompt_sha256": prompt.sha256}

    with CellRecords(cell.folder, identity) as records:
        made_with = {key: records.metrics.get(key) for key in ("model", "environments")}
        made_with |= {"data": asdict(data), "prompt": asdict(prompt)}
        pending = [row for row in rows if row.id not in records.samples]

        def finish() -> dict[str, Any]:
            metrics = cell_metrics(cell, rows, records.samples, made_with)
            records.write_metrics(metrics)
            return metrics

        def close() -> None:
            records.stop_adding()
            metrics = finish()
            done = metrics["n"] + metrics["n_failed"]
            print(
                f"interrupted: {done} of {len(rows)} samples of {cell.folder} are recorded; "
                "the same command goes on from there",
                file=sys.stderr,
                flush=True,
            )

        if not pending:
            return finish()
        with closing(close):
            model.load(force_eager_attention=cell.attention == "eager")
            made_with |= {
                "model": model.description(),
                "environments": _with_this_one(made_with["environments"] or []),
            }
            finish()  # so that it is on record however this ends
            tracker = Tracker(cell)
            on_progress(len(rows) - len(pending), len(rows))
            for done, row in enumerate(pending, start=len(rows) - len(pending) + 1):
                records.add(_run_sample(cell, model, template, row))
                scores = [s["score"] for s in records.samples.values() if s["error"] is None]
                tracker.log_sample(done, {"running_score": sum(scores) / len(scores)} if scores else {})
                on_progress(done, len(rows))
            metrics = finish()
            tracker.finish(metrics, [records.samples[row.id] for row in rows])
        return metrics


def _with_this_one(earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All environments that a cell's samples were made in, the present one among them."""
    present = environment()
    return earlier if present in earlier else [*earlier, present]


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
            answers=row.answers,
        )
        sample["score"] = score_sample(cell.dataset.name, generation.text, row.answers, row.all_classes)
        sample |= asdict(generation)
        sample["prediction"] = sample.pop("text")
    except Exception as error:  # one sample's failure must not take the others' results with it
        sample["error"] = f"{type(error).__name__}: {error}"
    if sample["error"] is not None:
        # Only now, with the traceback gone, is nothing of the failed forward held any more.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return sample
