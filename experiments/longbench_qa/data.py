"""The rows of a data set: LongBench v1 and LongBench-E files, and the project's own."""

import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any, TypeVar

from experiments.longbench_qa.demo.files import FILES, LONG_TEXT, SHA256, built_in_file, demo_file, generated
from experiments.longbench_qa.sources import Content, Provenance, read_data

T = TypeVar("T")

LONGBENCH = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
)
LONGBENCH_E = (
    "qasper_e",
    "multifieldqa_en_e",
    "hotpotqa_e",
    "2wikimqa_e",
    "gov_report_e",
    "multi_news_e",
    "trec_e",
    "triviaqa_e",
    "samsum_e",
    "passage_count_e",
    "passage_retrieval_en_e",
    "lcc_e",
    "repobench-p_e",
)
DEMO = "demo_qa"
DEMO_SETS = tuple(FILES)  # of 512, 1024, 2048 and 4096 tokens
BUILT_IN = (*DEMO_SETS, LONG_TEXT)


@dataclass(frozen=True)
class Row:
    """One sample. `length` is the data set's own figure (words, or characters in Chinese), not tokens.

    answer_span: [start, end) in characters of the context, where a data set says where its answer stands.
    """

    id: str
    input: str
    context: str
    answers: list[str]
    length: int
    dataset: str
    language: str
    all_classes: list[str] | None
    answer_span: tuple[int, int] | None = None


def base_name(dataset: str) -> str:
    """The data set whose prompt and metric `dataset` uses: `hotpotqa_e` -> `hotpotqa`, `long_text` -> `demo_qa`.

    Raises ValueError for a name that is no known data set.
    """
    if dataset in LONGBENCH_E:
        return dataset.removesuffix("_e")
    if dataset in LONGBENCH:
        return dataset
    if dataset in BUILT_IN:
        return DEMO
    known = ", ".join([*BUILT_IN, *LONGBENCH, *LONGBENCH_E])
    raise ValueError(f"unknown data set {dataset!r}; known: {known}")


def load_data(
    dataset: str, data_dir: str | None, max_samples: int | None, cache_dir: str | None = None, *, store: bool = True
) -> tuple[list[Row], Provenance]:
    """The first `max_samples` rows (None: all) of `dataset`, in file order, and where they come from.

    A built-in set is generated once into `cache_dir`; with `store` False it is not written there. Any other is in
    LongBench's own format: `DATASET.jsonl` in the folder `data_dir`, or (None) in the authors' data.zip, downloaded
    once into `cache_dir`. The sha256 is that of the whole file, however many rows are asked for; rows after the last of
    these are not checked.
    Raises ValueError, with file and line number where there is one, for what is missing or malformed.
    """
    base_name(dataset)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; allowed: an integer >= 1, or null for all rows")
    if dataset in BUILT_IN:
        file = built_in_file(dataset, cache_dir)
        raw = demo_file(dataset, cache_dir).read_bytes() if store or file.is_file() else generated(dataset)
        content = Content(raw, str(file), Provenance("builtin", SHA256[dataset]))
    else:
        content = read_data(dataset, data_dir, cache_dir)
    return _parse_lines(content.raw, content.where, max_samples), content.provenance


def load_rows(dataset: str, data_dir: str | None, max_samples: int | None, cache_dir: str | None = None) -> list[Row]:
    """`load_data` without the provenance."""
    return load_data(dataset, data_dir, max_samples, cache_dir)[0]


def _parse_lines(content: bytes, file: str, max_samples: int | None) -> list[Row]:
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    # Iterating over the bytes ends lines at \n only: str.splitlines would also cut at a U+2028 inside a text.
    for number, line in enumerate(BytesIO(content), start=1):
        if len(rows) == max_samples:
            break
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = _parse_line(line, where)
        if row.id in line_of_id:
            raise ValueError(f"{where}: _id {row.id!r} was already used in line {line_of_id[row.id]}")
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no rows")
    return rows


def _parse_line(line: bytes, where: str) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if type(fields) is not dict:
        raise ValueError(f"{where}: expected a JSON object, got {type(fields).__name__}")
    return Row(
        id=_field(fields, "_id", str, where),
        input=_field(fields, "input", str, where),
        context=_field(fields, "context", str, where),
        answers=_texts(fields, "answers", where),
        length=_field(fields, "length", int, where),
        dataset=_field(fields, "dataset", str, where),
        language=_field(fields, "language", str, where),
        all_classes=None if fields.get("all_classes", "") is None else _texts(fields, "all_classes", where),
        answer_span=_span(fields, where),
    )


def _field(fields: dict[str, Any], key: str, kind: type[T], where: str) -> T:
    if key not in fields:
        raise ValueError(f"{where}: key {key!r} is missing")
    value: T = fields[key]
    if type(value) is not kind:  # not isinstance: true and false would pass for an int
        raise ValueError(f"{where}: {key!r} must be of type {kind.__name__}, got {type(value).__name__}")
    return value


def _texts(fields: dict[str, Any], key: str, where: str) -> list[str]:
    texts = _field(fields, key, list, where)
    if not texts or any(type(text) is not str for text in texts):
        raise ValueError(f"{where}: {key!r} must be a list of one or more strings, got {texts!r}")
    return texts


def _span(fields: dict[str, Any], where: str) -> tuple[int, int] | None:
    """Of a row that says where its answer stands; LongBench's do not."""
    span = fields.get("answer_span")
    if span is None:
        return None
    if type(span) is not list or [type(edge) for edge in span] != [int, int]:
        raise ValueError(f"{where}: 'answer_span' must be a list of two integers, got {span!r}")
    start, end = span
    if not 0 <= start < end <= len(fields["context"]):
        raise ValueError(
            f"{where}: 'answer_span' {span} is not inside the context's {len(fields['context'])} characters"
        )
    return start, end
