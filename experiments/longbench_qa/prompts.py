"""Prompt templates, and filling them in with a row's context and question."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.longbench_qa.data import DEMO, base_name
from experiments.longbench_qa.sources import OFFICIAL_PROMPTS, Provenance, cached

MODES = ("official", "file", "builtin")
CONTEXT = "{context}"
INPUT = "{input}"
DEMO_TEMPLATE = "{context}\n{input}"  # the input ends where the answer begins


@dataclass(frozen=True)
class FilledPrompt:
    """A prompt, and where the context lies in it: `text[context_start:context_end]`, in characters."""

    text: str
    context_start: int
    context_end: int


def load_prompt(
    dataset: str, prompts_file: str | None = None, prompts: str | None = None, cache_dir: str | None = None
) -> tuple[str, Provenance]:
    """The template of `dataset`, with `{context}` and mostly `{input}` in it, and where it comes from.

    `prompts` is `official` (LongBench's own dataset2prompt.json, downloaded once into `cache_dir`), `file` (such a
    file: a JSON object from data set name to template; a LongBench-E set has that of its name without `_e`), or
    `builtin` (the project's own, for demo_qa only). None: as `choose_prompts` says.
    The sha256 is that of the template's text: equal for the same prompt from another place.
    Raises ValueError for whatever is unknown, missing or malformed.
    """
    name = base_name(dataset)
    mode = choose_prompts(dataset, prompts, prompts_file)
    if mode == "builtin":
        template, source = DEMO_TEMPLATE, "builtin"
    elif mode == "official":
        file = cached(OFFICIAL_PROMPTS, cache_dir, "give prompts_file=PATH, a copy of it elsewhere")
        template, source = _read_template(file, str(file), dataset, name), OFFICIAL_PROMPTS.url
    else:
        template, source = _read_template(Path(str(prompts_file)), f"prompts_file={prompts_file}", dataset, name), mode
    return template, Provenance(source, hashlib.sha256(template.encode()).hexdigest())


def load_template(
    dataset: str, prompts_file: str | None = None, prompts: str | None = None, cache_dir: str | None = None
) -> str:
    """`load_prompt` without the provenance."""
    return load_prompt(dataset, prompts_file, prompts, cache_dir)[0]


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


def choose_prompts(dataset: str, prompts: str | None, prompts_file: str | None) -> str:
    """`prompts`, or for None what fits: a data set of the project's own has its own, any other LongBench's or a file's.

    Raises ValueError for what does not fit together.
    """
    own = base_name(dataset) == DEMO
    if prompts is None:  # a prompts_file may be given for a sweep that has demo_qa beside others
        return "builtin" if own else "official" if prompts_file is None else "file"
    if prompts not in MODES:
        raise ValueError(f"prompts={prompts!r}, allowed is one of {', '.join(MODES)}")
    if own != (prompts == "builtin"):
        raise ValueError(f"prompts={prompts} is not for {dataset}, allowed is {'builtin' if own else 'official, file'}")
    if prompts == "file" and prompts_file is None:
        raise ValueError("prompts=file needs prompts_file=PATH, in the form of LongBench's dataset2prompt.json")
    if prompts != "file" and prompts_file is not None:
        raise ValueError(f"prompts={prompts} does not read prompts_file={prompts_file}; give one of the two")
    return prompts


def _read_template(path: Path, where: str, dataset: str, name: str) -> str:
    templates = _read_json(path, where)
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


def _read_json(path: Path, where: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{where} does not exist; it should be LongBench's dataset2prompt.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not JSON: {error.msg} at {place}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None
