"""The built-in demo model and a prompt for it: files of the study, found without importing its code."""

import json
from importlib.resources import files
from pathlib import Path

DEMO = "demo"  # the model's name
FILES = "experiments.longbench_qa.demo"


def demo_model_folder() -> Path:
    """The checkpoint's folder."""
    return _path("model")


def demo_prompt(row: int = 0) -> str:
    """A row of the built-in data set as the study prompts it, about a thousand tokens; it ends where the answer begins.

    Raises ValueError for a row that is not there.
    """
    rows = _path("rows_1024.jsonl").read_text(encoding="utf-8").splitlines()
    if not 0 <= row < len(rows):
        raise ValueError(f"row {row} of the built-in prompts, allowed is 0 to {len(rows) - 1}")
    fields = json.loads(rows[row])
    return f"{fields['context']}\n{fields['input']}"


def _path(name: str) -> Path:
    path = Path(str(files(FILES) / name))
    if not path.exists():
        raise ValueError(f"{path} does not exist: this installation lacks the built-in demo")
    return path
