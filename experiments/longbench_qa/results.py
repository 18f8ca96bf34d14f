"""Read what runs recorded: a frame of samples and a frame of cells, for tables, notebooks and reports.

python -m experiments.longbench_qa.results FOLDER... [--parquet FILE]    # FOLDER: an output_dir, or any folder of cells

Reading takes no lock and writes nothing, so that it is safe beside a run.
"""

import argparse
import json
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.longbench_qa.records import FORMAT, SAMPLE_KEYS
from experiments.longbench_qa.significance import mean_interval

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

NUMBERS = (
    "prompt_tokens",
    "generated_tokens",
    "compressed_tokens",
    "budget_tokens",
    "kept_tokens",
    "answer_kept",
    "cache_bytes",
    "bookkeeping_bytes",
    "prefill_ms",
    "decode_ms_per_token",
    "weights_bytes",
    "prefill_peak_bytes",
    "decode_peak_bytes",
    "total_peak_bytes",
)
FLAGS = ("truncated", "prefill_shared")
LISTS = ("answers", "kept_by_layer", "answer_kept_heads")
SAMPLE_COLUMNS = ("id", "score", "error", "prediction", *NUMBERS, *FLAGS, *LISTS)


@dataclass(frozen=True)
class Results:
    """What was found.

    Attributes:
        cells: a row a folder that holds any of a cell's files. `path`; `status`, one of this module's, with `reason` in
            words where it is not plainly complete; samples finished (`n`), asked for last (`n_rows`) and failed
            (`n_failed`). Then what the cell is: `NAMES`, and config.json's keys (`attention`, `compress`,
            `method.window`, `model.dtype`, ...); missing where it could not be read.
        samples: a row a recorded sample of the cells with status `HAS_SAMPLES`: `path` and `status` of its cell, what
            the cell is, and predictions.jsonl's keys (`effective.window_eff`, ... for the method's effective options).
            A failed sample has an `error` and no score.
    """

    cells: pd.DataFrame
    samples: pd.DataFrame


class _UnreadableError(Exception):
    """A cell whose samples cannot be used: its status, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def load_results(*folders: str | Path) -> Results:
    """Read every cell in these folders, each an output_dir, a part of one, or a cell; a cell given twice is read once.

    What is wrong with a cell is said in its row of `cells`. Raises ValueError only for a folder that holds no cell.
    """
    cells: dict[Path, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for folder in folders:
        found = list(_cell_folders(Path(folder)))
        if not found:
            raise ValueError(f"{folder} holds no cells: give the output_dir of a run")
        for path in found:
            if path.resolve() not in cells:
                cells[path.resolve()], of_cell = _read_cell(path)
                samples += of_cell
    of_cells = _frame(list(cells.values()), (*CELL_COLUMNS, *NAMES))
    counts = {name: "Int64" for name in ("n", "n_rows", "n_failed")}
    of_cells = of_cells.astype(counts)
    of_samples = _frame(samples, ("path", *SAMPLE_COLUMNS))
    effective = [name for name in of_samples.columns if name.startswith("effective.")]
    of_samples = of_samples.astype(dict.fromkeys(("score", *NUMBERS, *effective), "float64"))
    of_samples = of_samples.astype(dict.fromkeys(FLAGS, "boolean"))
    what = of_cells.drop(columns=["reason", *counts]).set_index("path")
    of_samples = pd.concat(
        [what.reindex(of_samples["path"]).reset_index(), of_samples.drop(columns="path")], axis="columns"
    )
    return Results(of_cells, of_samples)


def cell_means(
    results: Results, value: str = "score", statuses: Collection[str] = (COMPLETE,)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a cell: what it is, and a column's `mean` over the samples that have it, with its interval `low` to `high`.

    Args:
        statuses: of the cells to take, out of `HAS_SAMPLES`. Where samples failed or are missing it is the rest's mean.

    Returns:
        The table, its `n` the samples that have the value; and the rows of `cells` that were left out, with the reason.
    """
    unusable = sorted(set(statuses) - set(HAS_SAMPLES))
    if unusable:
        raise ValueError(f"statuses={unusable}, allowed is any of {', '.join(HAS_SAMPLES)}")
    _require_number(value)
    taken = results.cells["status"].isin(statuses)
    rows = []
    for cell in results.cells[taken].drop(columns="reason").to_dict("records"):
        values = _values(results, cell["path"], value)
        mean = mean_interval(list(values.values())) if values else None
        found = (mean.n, mean.mean, mean.low, mean.high) if mean else (0, None, None, None)
        rows.append(cell | dict(zip(("n", "mean", "low", "high"), found, strict=True)))
    table = pd.DataFrame(rows, columns=[*results.cells.columns.drop("reason"), "mean", "low", "high"])
    return table.astype(dict.fromkeys(("mean", "low", "high"), "float64")), results.cells[~taken]


def values_by_id(
    results: Results, path: str | Path, value: str = "score", statuses: Collection[str] = (COMPLETE,)
) -> dict[str, float]:
    """{sample id: value} of one cell, as `significance` compares them; samples without the value are left out.

    Raises ValueError for a cell that is not there or whose status is none of `statuses`.
    """
    _require_number(value)
    found = results.cells[results.cells["path"] == str(path)]
    if found.empty:
        raise ValueError(f"no cell {path} among {len(results.cells)}")
    status, reason = found.iloc[0][["status", "reason"]]
    if status not in statuses:
        raise ValueError(f"{path} is {status} ({reason}), allowed is {', '.join(statuses)}")
    return _values(results, str(path), value)


def to_parquet(results: Results, file: str | Path) -> None:
    """Write the frame of samples. Raises ValueError if it cannot be written, ImportError without pyarrow."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("Parquet needs the package pyarrow: pip install 'cab-attention[parquet]'") from error
    try:
        results.samples.to_parquet(file, engine="pyarrow", index=False)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror or error}") from error


def print_cells(results: Results) -> None:
    """A line a cell, the score with its 95 % interval where it is complete; below, what there is to say of a cell."""
    table = Table(title="Cells")
    for column in ("model", "method", "budget", "data set", "status", "n", "score", "95 % interval"):
        is_number = column in ("budget", "n", "score", "95 % interval")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    means, _ = cell_means(results)
    scores = {row["path"]: row for row in means.to_dict("records")}
    for cell in results.cells.to_dict("records"):
        known = isinstance(cell["model"], str)
        names = [cell["model"], cell["method"], cell["budget"], Path(cell["path"]).name] if known else ["-"] * 4
        counts = "-" if pd.isna(cell["n"]) else f"{cell['n']}/{'?' if pd.isna(cell['n_rows']) else cell['n_rows']}"
        row = scores.get(cell["path"])
        score = f"{row['mean']:.2f}" if row else "-"
        interval = f"{row['low']:.2f} to {row['high']:.2f}" if row and not math.isnan(row["low"]) else "-"
        table.add_row(*map(escape, names), cell["status"], counts, score, interval)
    console = Console()
    if not console.is_terminal:  # a log file has no width
        console = Console(width=1000)
    console.print(table)
    for cell in results.cells[results.cells["reason"] != ""].to_dict("records"):
        console.print(escape(f"{cell['status']}: {cell['path']}: {cell['reason']}"), soft_wrap=True, highlight=False)


def _require_number(value: str) -> None:
    if value not in ("score", *NUMBERS):
        raise ValueError(f"value={value!r}, allowed is one of {', '.join(('score', *NUMBERS))}")


def _values(results: Results, path: str, value: str) -> dict[str, float]:
    """Sorted by id, so that nothing depends on the order in which samples were run."""
    of_cell = results.samples[results.samples["path"] == path].dropna(subset=[value])
    return dict(sorted(zip(of_cell["id"], of_cell[value], strict=True)))


def _frame(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> pd.DataFrame:
    """With the columns `first` first; a column whose values are of several kinds becomes text, as Parquet needs."""
    columns = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    frame = pd.DataFrame([dict(row) for row in rows], columns=columns)
    for name in columns:
        kind = pd.api.types.infer_dtype(frame[name], skipna=True)
        if kind.startswith("mixed") and name not in LISTS:
            frame[name] = frame[name].map(str, na_action="ignore")
    return frame


def _cell_folders(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise ValueError(f"cannot read {error.filename}: {error.strerror}")

    for path, folders, files in os.walk(folder, onerror=refuse):
        folders.sort()
        if not set(CELL_FILES).isdisjoint(files):
            yield Path(path)


def _read_cell(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A cell's row of `cells`, and its samples."""
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
        row |= _counted(_object(metrics, "metrics.json"))
        samples, cut_short = _samples(predictions or b"")
    except _UnreadableError as error:
        return row | {"status": error.status, "reason": str(error)}, []
    metrics_status = row.pop("metrics_status")
    errors = [sample["error"] for sample in samples if sample["error"] is not None]
    row |= {"n": len(samples) - len(errors), "n_failed": len(errors)}
    missing = row["n_rows"] - len(samples)
    if missing > 0:
        reasons = [f"{missing} of {row['n_rows']} samples are missing"]
        reasons += [f"{len(errors)} failed"] if errors else []
        reasons += ["the last line is cut short"] if cut_short else []
        row |= {"status": INCOMPLETE, "reason": ", ".join(reasons)}
    elif errors:
        first = errors[0].partition("\n")[0]
        row |= {"status": FAILED, "reason": f"{len(errors)} of {len(samples)} samples failed, the first with {first}"}
    elif metrics_status != COMPLETE:
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
    return {"n_rows": n_rows, "budget_kind": metrics["budget_kind"], "metrics_status": metrics.get("status")}


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--parquet", type=Path, metavar="FILE", help="write the samples there")
    options = parser.parse_args(arguments)
    try:
        results = load_results(*options.folders)
        print_cells(results)
        if options.parquet is not None:
            to_parquet(results, options.parquet)
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
