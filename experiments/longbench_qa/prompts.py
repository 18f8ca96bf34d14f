"""Prompt templates, and filling them in with a row's context and question."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.longbench_qa.data import DEMO, base_name

CONTEXT = "{context}"
INPUT = "{input}"
DEMO_TEMPLATE = (
    "Here are some notes about a village.\n\n{context}\n\n"
    "Reply with a few words from the notes and nothing else.\n\nQuestion: {input}\nAnswer:"
)


@dataclass(frozen=True)
class FilledPrompt:
    """A prompt, and where the context lies in it: `text[context_start:context_end]`, in characters."""

    text: str
    context_start: int
    context_end: int


def load_template(dataset: str, prompts_file: str | None) -> str:
    """The template of `dataset`, with `{context}` and mostly `{input}` in it.

    demo_qa has the project's own; a LongBench set's is read from `prompts_file`, a JSON object from data set
    name (a LongBench-E set: without `_e`) to template.
    Raises ValueError for whatever is unknown, missing or malformed.
    """
    name = base_name(dataset)
    if name == DEMO:
        return DEMO_TEMPLATE
    if prompts_file is None:
        raise ValueError(f"{dataset} needs prompts_file=PATH, with LongBench's dataset2prompt.json")
    where = f"prompts_file={prompts_file}"
    templates = _read_json(Path(prompts_file))
    if type(templates) is not dict:
        raise ValueError(f"{where} must hold one JSON object of templates, got {type(templates).__name__}")
    if name not in templates:
        given = ", ".join(templates) or "nothing"
        raise ValueError(f"{where} has no key {name!r}, needed for {dataset}; it has: {given}")
    template = templates[name]
    if type(template) is not str:
        raise ValueError(f"{where}: {name!r} must be a string, got {type(template).__name__}")
    if (count := template.count(CONTEXT)) != 1:
        raise ValueError(f"{where}: {name!r} must hold {CONTEXT} once, it holds it {count} times")
    return template


def fill_template(template: str, context: str, question: str) -> FilledPrompt:
    """Put `context` and `question` where the template says `{context}` (once) and `{input}`.

    Only the template's own two placeholders count: braces in the row's text and any others in the template
    stay as they are. Raises ValueError if the template does not hold `{context}` exactly once.
    """
    parts = template.split(CONTEXT)
    if len(parts) != 2:
        raise ValueError(f"a template must hold {CONTEXT} once, this one has {len(parts) - 1}: {template!r}")
    # The context is joined in after the question, so a "{input}" inside it is never replaced.
    before, after = (part.replace(INPUT, question) for part in parts)
    return FilledPrompt(before + context + after, len(before), len(before) + len(context))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"prompts_file={path} does not exist; it should be LongBench's dataset2prompt.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"prompts_file={path} is not JSON: {error.msg} at {place}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file={path} is not UTF-8: {error.reason} at byte {error.start}") from None
