"""The rows of a data set: LongBench v1 and LongBench-E files, and the project's own demo_qa."""

import hashlib
import json
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import Any, TypeVar

from experiments.longbench_qa.sources import Provenance, read_data

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


@dataclass(frozen=True)
class Row:
    """One sample. `length` is the data set's own figure (words, or characters in Chinese), not tokens."""

    id: str
    input: str
    context: str
    answers: list[str]
    length: int
    dataset: str
    language: str
    all_classes: list[str] | None


def base_name(dataset: str) -> str:
    """The data set whose prompt and metric `dataset` uses: `hotpotqa_e` -> `hotpotqa`.

    Raises ValueError for a name that is no known data set.
    """
    if dataset in LONGBENCH_E:
        return dataset.removesuffix("_e")
    if dataset in LONGBENCH or dataset == DEMO:
        return dataset
    known = ", ".join([DEMO, *LONGBENCH, *LONGBENCH_E])
    raise ValueError(f"unknown data set {dataset!r}; known: {known}")


def load_data(
    dataset: str, data_dir: str | None, max_samples: int | None, cache_dir: str | None = None
) -> tuple[list[Row], Provenance]:
    """The first `max_samples` rows (None: all) of `dataset`, in file order, and where they come from.

    `demo_qa` is generated. Any other set is in LongBench's own format: `DATASET.jsonl` in the folder `data_dir`, or
    (None) in the authors' data.zip, downloaded once into `cache_dir`. The sha256 is that of the whole file (demo_qa:
    of its rows as canonical JSON), however many rows are asked for; rows after the last of these are not checked.
    Raises ValueError, with file and line number where there is one, for what is missing or malformed.
    """
    base_name(dataset)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; allowed: an integer >= 1, or null for all rows")
    if dataset == DEMO:
        return _demo(max_samples)
    content = read_data(dataset, data_dir, cache_dir)
    return _parse_lines(content.raw, content.where, max_samples), content.provenance


def load_rows(dataset: str, data_dir: str | None, max_samples: int | None, cache_dir: str | None = None) -> list[Row]:
    """`load_data` without the provenance."""
    return load_data(dataset, data_dir, max_samples, cache_dir)[0]


def _demo(max_samples: int | None) -> tuple[list[Row], Provenance]:
    from experiments.longbench_qa.demo_data import demo_rows  # here: demo_data itself needs Row

    rows = demo_rows()
    canonical = json.dumps([asdict(row) for row in rows], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return rows[:max_samples], Provenance("builtin", hashlib.sha256(canonical.encode()).hexdigest())


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
