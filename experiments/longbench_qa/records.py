"""A cell's folder: config.json says what it is, predictions.jsonl holds a line a sample, metrics.json the result."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "cab-attention")


class CellRecords:
    """Reads and writes one cell's folder. A sample's line is on disk before the next sample begins."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open the folder, making it if need be. Raises ValueError if it cannot be written or holds another cell."""
        self.folder = folder
        self.predictions_path = folder / "predictions.jsonl"
        self.metrics_path = folder / "metrics.json"
        config_path = folder / "config.json"
        identity = json.loads(json.dumps(identity))  # as it will be read back
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if config_path.exists():
                _refuse_other_cell(config_path, identity)
            else:
                _write_whole(config_path, identity)
        except OSError as error:
            raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
        self.samples = self._read_predictions()

    def _read_predictions(self) -> dict[str, dict[str, Any]]:
        if not self.predictions_path.exists():
            return {}
        text = self.predictions_path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a line cut short by a crash is done again
        if len(whole) < len(text):
            with self.predictions_path.open("r+b") as file:
                file.truncate(len(whole))
        samples = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                sample = json.loads(line)
                samples[sample["id"]] = sample
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{self.predictions_path}, line {number}: not a record of this harness") from None
        return samples

    def add(self, sample: dict[str, Any]) -> None:
        """Append a sample's record and flush it to disk."""
        with self.predictions_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(sample, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.samples[sample["id"]] = sample

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json in one step."""
        _write_whole(self.metrics_path, metrics)


def _refuse_other_cell(path: Path, identity: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not a cell's config") from None
    different = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
    if different:
        changes = "; ".join(f"{key}: {found.get(key)} there, {identity.get(key)} now" for key in different)
        raise ValueError(f"{path.parent} holds another cell ({changes}): give another output_dir")


def _write_whole(path: Path, content: dict[str, Any]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)


def environment() -> dict[str, Any]:
    """What the numbers were made with: library versions, GPU, and the commit of this repository."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:
        return None


def _commit() -> str | None:
    """Commit hash, with `-dirty` when tracked files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
