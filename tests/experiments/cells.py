"""A small cell on the built-in model and data, for tests of what happens around it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cab_attention import H2O
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.schema import DatasetConfig, ModelConfig, WandbConfig

MODEL = ModelConfig(name="tiny", kind="tiny", max_length=300, device="cpu")


def demo_cell(output_dir: Path, **changes: Any) -> Cell:
    cell = Cell(
        model=MODEL,
        method=H2O(32),
        dataset=DatasetConfig(name="demo_qa", max_new_tokens=4),
        attention="cab",
        compress="after_prompt",
        first_token="full",
        truncate="middle",
        chat_template="official",
        prompts="builtin",
        prompts_file=None,
        prefill_chunk=None,
        seed=0,
        max_samples=3,
        data_dir=None,
        cache_dir=None,
        output_dir=str(output_dir),
        wandb=WandbConfig(mode="disabled"),
        share_prefill=True,
    )
    return replace(cell, **changes)


def recorded(cell: Cell) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl."""
    return [json.loads(line) for line in (cell.folder / "predictions.jsonl").read_text().splitlines()]
