"""The rows of results/kernels/benchmarks.csv: columns, where they were made, and how a run replaces older ones."""

import csv
import os
import subprocess
from collections.abc import Collection, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from kernel_checks import Shape
from kernel_timing import Percentiles

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "kernels"
Row = dict[str, str]
NUMBERS = ("p50", "p20", "p80")
SHAPE = ("dtype", "batch", "heads", "kv_heads", "head_dim", "n_queries", "n_keys", "causal")
STAMP = ("gpu", "torch", "triton", "cudnn", "transformers", "commit", "date")
COLUMNS = ("group", "provider", "what", "unit", *NUMBERS, "mode", *SHAPE, *STAMP, "note")


def make_row(
    group: str,
    provider: str,
    what: str,
    unit: str,
    numbers: Percentiles | None,
    shape: Shape | None = None,
    mode: str = "",
    note: str = "",
) -> Row:
    """One measured figure; `numbers` None: there is none, and `note` says why."""
    if numbers is None and not note:
        raise ValueError(f"{group}, {provider}, {what}: a row without numbers needs a note that says why")
    values = [None if numbers is None else getattr(numbers, name) for name in NUMBERS]
    row = dict(group=group, provider=provider, what=what, unit=unit, mode=mode, note=note)
    row |= {name: "" if value is None else f"{value:.6g}" for name, value in zip(NUMBERS, values, strict=True)}
    return row | {name: "" if shape is None else str(getattr(shape, name)) for name in SHAPE}


def stamp(commit: str | None) -> Row:
    """Where and when: GPU, versions, commit (of this checkout unless it is given) and date (UTC)."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "transformers": _version("transformers"),
        "commit": commit or current_commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def current_commit() -> str:
    """Commit hash, with `-dirty` when files outside results/ differ from it; "unknown" outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".", ":!results") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file. Raises ValueError if it is another kind of file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: its columns are {reader.fieldnames}, expected {list(COLUMNS)}")
        return list(reader)


def merged(old: Iterable[Row], new: Iterable[Row], groups: Collection[str]) -> list[Row]:
    """The new rows in the place of all old ones of the groups that were run; sorted by group."""
    rows = [row for row in old if row["group"] not in groups]
    return sorted([*rows, *new], key=lambda row: row["group"])  # stable: a group keeps its order


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Write a CSV whole, or leave the one that is there. What a row lacks stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)
