"""Prompts to try on the page: of each family of questions in the built-in data set one, with its answer."""

import json
from importlib.resources import files

from pydantic import BaseModel

from cab_attention.builtin_demo import FILES, demo_prompt

N_FAMILIES = 6  # the data set's rows take turns


class Example(BaseModel):
    name: str
    prompt: str
    answers: list[str]


def examples() -> list[Example]:
    """They are made for the `demo` model; other models can be asked them too."""
    with (files(FILES) / "rows_1024.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(N_FAMILIES), strict=False)]
    return [
        Example(name=_family(row["_id"]), prompt=demo_prompt(number), answers=row["answers"])
        for number, row in enumerate(rows)
    ]


def _family(row_id: str) -> str:
    """`two hop` of `two_hop-1024-000`."""
    return row_id.split("-")[0].replace("_", " ")
