"""A recorded cell, read without a lock: whether it can be used, and if not why; its samples.

Nothing is written, so that reading is safe beside a run.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.longbench_qa.records import FORMAT, NUMBERS, SAMPLE_KEYS

COMPLETE = "complete"
INCOMPLETE = "incomplete"  # rows asked for have no record: interrupted, or being run right now
FAILED = "failed samples"  # every row has its record, some are errors
CORRUPT = "corrupt"  # a file of the cell does not hold what the harness writes
FOREIGN = "foreign"  # not a cell of this harness, or not in a cell's place
OLD_FORMAT = "old format"  # or a newer one: of another version of the harness
HALF_WRITTEN = "half-written"  # a file of the cell is not there
HAS_SAMPLES = (COMPLETE, INCOMPLETE, FAILED)
"""States of a cell whose samples can be read."""

CELL_FILES = ("config.json", "predictions.jsonl", "metrics.json", ".lock")
CELL_COLUMNS = ("path", "status", "reason", "n", "n_rows", "n_failed")
NAMES = ("model", "method", "budget", "budget_kind", "dataset")
"""Columns that name a cell: model and method as in the cell's folder, with every option that is not at its default."""

MADE_WITH = ("model", "data", "prompt", "environments")
PLACES = ("dataset", "data_dir", "cache_dir", "prompts", "prompts_file")
"""Keys of metrics.json, and of its `config`, that say what a cell was made with and where its prompts were."""

FLAGS = ("truncated", "prefill_shared")
LISTS = ("answers", "kept_by_layer", "answer_kept_heads")
SAMPLE_COLUMNS = ("id", "score", "error", "prediction", *NUMBERS, *FLAGS, *LISTS)


class _UnreadableError(Exception):
    """A cell whose samples cannot be used: its status, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def cell_folders(folder: Path) -> Iterator[Path]:
    """Folders at any depth that hold any of a cell's files. Raises ValueError for one that cannot be looked into."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for path, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        if not set(CELL_FILES).isdisjoint(files):
            yield Path(path)


def read_cell(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's row of `Results.cells`, and its samples if they can be used; then `provenance` is in the row too."""
    row: dict[str, Any] = {"path": str(folder), "reason": ""}
    try:
        # A run writes its samples before the metrics that count them: read in this order, what a run is at work on
        # is never taken for complete.
        predictions, metrics, config = (
            _content(folder / name) for name in ("predictions.jsonl", "metrics.json", "config.json")
        )
        if config is None:
            raise _UnreadableError(HALF_WRITTEN, "no config.json")
        row |= _identity(_object(config, "config.json"), folder)
        if metrics is None and predictions is not None:
            raise _UnreadableError(HALF_WRITTEN, "predictions.jsonl without metrics.json")
        if metrics is None:
            return row | {"status": INCOMPLETE, "reason": "nothing is recorded yet", "n": 0, "n_failed": 0}, []
        recorded = _object(metrics, "metrics.json")
        row |= _counted(recorded)
        samples, cut_short = _samples(predictions or b"")
    except _UnreadableError as error:
        return row | {"status": error.status, "reason": str(error)}, []
    errors = [sample["error"] for sample in samples if sample["error"] is not None]
    row |= {"n": len(samples) - len(errors), "n_failed": len(errors), "provenance": _provenance(recorded)}
    missing = row["n_rows"] - len(samples)
    if missing > 0:
        reasons = [f"{missing} of {row['n_rows']} samples are missing"]
        reasons += [f"{len(errors)} failed"] if errors else []
        reasons += ["the last line is cut short"] if cut_short else []
        row |= {"status": INCOMPLETE, "reason": ", ".join(reasons)}
    elif errors:
        first = errors[0].partition("\n")[0]
        row |= {"status": FAILED, "reason": f"{len(errors)} of {len(samples)} samples failed, the first with {first}"}
    elif recorded.get("status") != COMPLETE:
        row |= {"status": INCOMPLETE, "reason": "metrics.json is not over all samples yet"}
    else:
        more = f"{len(samples)} samples are recorded, {row['n_rows']} were asked for last"
        row |= {"status": COMPLETE, "reason": more if missing < 0 else ""}
    return row, [sample | {"path": row["path"]} for sample in samples]


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _UnreadableError(CORRUPT, f"{path.name} cannot be read: {error.strerror}") from None


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
        if rb"\u" in content:  # half of a surrogate pair, which is no text
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise _UnreadableError(CORRUPT, f"{where} is not JSON") from None
    if not isinstance(found, dict):
        raise _UnreadableError(CORRUPT, f"{where} is not a JSON object")
    return found


def _object(content: bytes, name: str) -> dict[str, Any]:
    found = _json(content, name)
    if "format" not in found:
        raise _UnreadableError(FOREIGN, f"{name} was not written by this harness")
    if found["format"] != FORMAT:
        raise _UnreadableError(OLD_FORMAT, f"{name} is of format {found['format']}, this version reads format {FORMAT}")
    return found


def _identity(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`NAMES` and the keys of config.json; those of model, method and dataset as `method.window`."""
    clashing = {*CELL_COLUMNS, *NAMES, *SAMPLE_COLUMNS} & config.keys() - {"model", "method", "dataset"}
    if clashing:
        raise _UnreadableError(CORRUPT, f"config.json has a key {min(clashing)}")
    for part in ("model", "method", "dataset"):
        if not isinstance(config.get(part), dict) or not isinstance(config[part].get("name"), str):
            raise _UnreadableError(CORRUPT, f"config.json names no {part}")
    *_, model, method, budget, dataset = ("", "", "", *Path(os.path.abspath(folder)).parts)
    names = method.split(",")[0], budget[:1], dataset.split(",")[0]
    if names != (config["method"]["name"], "b", config["dataset"]["name"]):
        raise _UnreadableError(FOREIGN, f"{model}/{method}/{budget}/{dataset} is not where such a cell lies")
    row = {"model": model, "method": method, "budget": budget[1:], "dataset": config["dataset"]["name"]}
    for key, value in config.items():
        if isinstance(value, dict):
            row |= {f"{key}.{option}": setting for option, setting in value.items()}
        elif key != "format":
            row[key] = value
    for known in ("method.budget", "dataset.name"):
        row.pop(known, None)
    return row


def _counted(metrics: Mapping[str, Any]) -> dict[str, Any]:
    n_rows = metrics.get("n_rows")
    if type(n_rows) is not int or not 1 <= n_rows < 2**63 or not isinstance(metrics.get("budget_kind"), str):
        raise _UnreadableError(CORRUPT, "metrics.json lacks n_rows or budget_kind")
    return {"n_rows": n_rows, "budget_kind": metrics["budget_kind"]}


def _provenance(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`MADE_WITH` of metrics.json as recorded, and `PLACES` of its config: as much of them as there is."""
    config = metrics.get("config")
    places = {key: config[key] for key in PLACES if key in config} if isinstance(config, dict) else {}
    return {key: metrics[key] for key in MADE_WITH if key in metrics} | {"config": places}


def _samples(content: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The records, and whether the last line is cut short: a crash, or a run that is writing it."""
    samples: dict[str, dict[str, Any]] = {}
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"predictions.jsonl, line {number}"
        sample = _json(line, where)
        wrong = [key for key in SAMPLE_KEYS | set(sample) if key not in sample or not _is_right(sample, key)]
        if sample.get("error", "") is None:  # finished
            wrong += set(SAMPLE_COLUMNS) - {"prefill_shared"} - set(sample)  # older records have no such key
        if wrong:
            raise _UnreadableError(CORRUPT, f"{where}: {min(wrong)} is not as the harness records it")
        if sample["id"] in samples:
            raise _UnreadableError(CORRUPT, f"{where}: sample {sample['id']!r} is there twice")
        effective = sample.pop("effective", {})
        samples[sample["id"]] = sample | {f"effective.{option}": value for option, value in effective.items()}
    return list(samples.values()), bool(rest)


def _is_right(sample: Mapping[str, Any], key: str) -> bool:
    """The harness records this key, with such values."""
    value, finished = sample.get(key), sample.get("error") is None
    if key == "id":
        return isinstance(value, str)
    if key in ("error", "prediction"):
        return value is None or isinstance(value, str)
    if key == "score":
        return _is_number(value) if finished else value is None
    if key in NUMBERS:
        return value is None or _is_number(value)
    if key in FLAGS:
        return isinstance(value, bool)
    if key == "answers":
        return isinstance(value, list) and all(isinstance(answer, str) for answer in value)
    if key in LISTS:
        return value is None or isinstance(value, list)
    if key == "effective":
        return isinstance(value, dict) and all(map(_is_number, value.values()))
    return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # not NaN
