"""What the page's sample browser shows, as compact JSON that stays below a size."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from experiments.longbench_qa.comparable import ComparableCell
from experiments.longbench_qa.recorded_cells import COMPLETE
from experiments.longbench_qa.results import Results

MOST_BYTES = 6_000_000  # of the samples' JSON: the page stays below 10 MB
MOST_CHARACTERS = 1_500  # of a prediction or a reference
LEVELS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"  # a share of 0 to 1 in one character


@dataclass
class Group:
    """One data set in one setting: its cells, and its samples, those with the widest spread of scores first."""

    column: str
    setting: str
    cells: Sequence[ComparableCell]
    notes: Sequence[str]
    pending: list[dict[str, Any]]
    n: int = 0
    shown: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n = len(self.pending)


def browser_data(
    results: Results,
    cells: Sequence[ComparableCell],
    tails: Mapping[str, tuple[Mapping[str, str], str]],
    most_bytes: int = MOST_BYTES,
) -> dict[str, Any]:
    """What `script.js` reads.

    Samples are added group by group in turn, in each group those with the widest spread of scores between cells first
    (the standard deviation), until their JSON would be larger than `most_bytes`.

    Args:
        tails: {column: (prompt tails by sample id, why there are none)}.
    """
    groups = list(_groups(results, cells))
    _fill(groups, tails, most_bytes)
    datasets = []
    for column in dict.fromkeys(group.column for group in groups):
        of_column = [group for group in groups if group.column == column]
        by_id, reason = tails.get(column, ({}, "the data set was not looked for"))
        shown = {sample["id"]: sample for group in of_column for sample in group.shown}
        datasets.append(
            {
                "name": column,
                "noPrompts": reason,
                "prompts": {id_: by_id[id_] for id_ in shown if id_ in by_id},
                "groups": [_group(group) for group in of_column],
            }
        )
    return {"levels": LEVELS, "datasets": datasets}


def to_script_json(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element or open a comment."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _groups(results: Results, cells: Sequence[ComparableCell]) -> Iterator[Group]:
    samples = {path: of_cell for path, of_cell in results.samples.groupby("path", sort=False)}
    statuses = dict(zip(results.cells["path"], results.cells["status"], strict=True))
    for setting, column in dict.fromkeys((cell.setting, cell.column) for cell in cells):
        of_group = [cell for cell in cells if (cell.setting, cell.column) == (setting, column) and cell.path in samples]
        if of_group:
            records = [{record["id"]: record for record in samples[cell.path].to_dict("records")} for cell in of_group]
            ids = dict.fromkeys(id_ for of_cell in records for id_ in of_cell)
            rows = [_sample(id_, [of_cell.get(id_) for of_cell in records]) for id_ in ids]
            rows.sort(key=lambda row: (-row["spread"], row["id"]))
            yield Group(column, setting, of_group, [_note(cell, statuses[cell.path]) for cell in of_group], rows)


def _note(cell: ComparableCell, status: str) -> str:
    if status != COMPLETE:
        return status
    return "not compared" if cell.scores is None else ""


def _fill(groups: Sequence[Group], tails: Mapping[str, tuple[Mapping[str, str], str]], most_bytes: int) -> None:
    """Move samples from `pending` to `shown`, one of each group in turn; a group that does not fit any more ends."""
    left, open_groups = most_bytes, list(groups)
    while open_groups:
        for group in list(open_groups):
            if not group.pending:
                open_groups.remove(group)
                continue
            sample = group.pending[0]
            tail = tails.get(group.column, ({}, ""))[0].get(sample["id"], "")
            size = len(to_script_json([sample, tail]).encode())
            if size > left:
                open_groups.remove(group)
                continue
            left -= size
            group.shown.append(group.pending.pop(0))


def _group(group: Group) -> dict[str, Any]:
    methods = list(dict.fromkeys(cell.method for cell in group.cells))
    budgets = list(dict.fromkeys(cell.budget for cell in group.cells))
    return {
        "setting": group.setting,
        "n": group.n,
        "methods": methods,
        "budgets": budgets,
        "cells": [
            [methods.index(cell.method), budgets.index(cell.budget), int(cell.is_full), note]
            for cell, note in zip(group.cells, group.notes, strict=True)
        ],
        "samples": group.shown,
    }


def _sample(id_: str, records: Sequence[Mapping[Any, Any] | None]) -> dict[str, Any]:
    """A sample in every cell. Equal answers and equal grids are held once, and pointed at; -1: there is none."""
    answers, grids = _Once(), _Once()
    found = [record for record in records if record is not None]
    scores = [record["score"] for record in found if not _missing(record["score"])]
    return {
        "id": id_,
        "references": [_cut(text) for text in found[0]["answers"]] if isinstance(found[0]["answers"], list) else [],
        "spread": round(statistics.pstdev(scores), 1) if scores else 0,
        "answer": [-1 if record is None else answers.index(_answer(record)) for record in records],
        "kept": [-1 if record is None else _percent(record["answer_kept"]) for record in records],
        "grid": [-1 if record is None else grids.index(_grid(record["answer_kept_heads"])) for record in records],
        "answers": answers.values,
        "grids": grids.values,
    }


class _Once:
    """Values in order, each once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._places: dict[str, int] = {}

    def index(self, value: Any) -> int:
        """Where the value stands; None stands nowhere."""
        if value is None:
            return -1
        key = json.dumps(value)
        if key not in self._places:
            self._places[key] = len(self.values)
            self.values.append(value)
        return self._places[key]


def _answer(record: Mapping[Any, Any]) -> list[Any]:
    """[prediction, score], or [error] of a sample that failed."""
    if not _missing(record["error"]):
        return [_cut(record["error"])]
    return [_cut(record["prediction"]), round(record["score"], 1)]


def _cut(text: str) -> str:
    left_out = len(text) - MOST_CHARACTERS
    return text if left_out <= 0 else f"{text[:MOST_CHARACTERS]}… ({left_out} more characters)"


def _percent(share: float) -> float:
    return -1 if _missing(share) else round(100 * share, 1)


def _grid(heads: Any) -> str | None:
    """A character a KV head, layers joined by full stops; None where the answer stands nowhere in the context."""
    if not isinstance(heads, list):
        return None
    steps = len(LEVELS) - 1
    return ".".join("".join(LEVELS[round(steps * min(1.0, max(0.0, share)))] for share in layer) for layer in heads)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA
