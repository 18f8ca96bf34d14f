"""The rows of a data set: LongBench v1 and LongBench-E files, and the project's own demo_qa."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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


def load_rows(dataset: str, data_dir: str | None, max_samples: int | None) -> list[Row]:
    """The first `max_samples` rows (None: all) of `dataset`, in file order.

    `demo_qa` is generated; any other set is read from `data_dir/DATASET.jsonl` in LongBench's own format.
    Rows after the last one asked for are neither read nor checked.
    Raises ValueError, with file and line number where there is one, for what is missing or malformed.
    """
    base_name(dataset)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; allowed: an integer >= 1, or null for all rows")
    if dataset == DEMO:
        from experiments.longbench_qa.demo_data import demo_rows  # here: demo_data itself needs Row

        return demo_rows()[:max_samples]
    return _read_jsonl(_find_file(dataset, data_dir), max_samples)


def _find_file(dataset: str, data_dir: str | None) -> Path:
    source = f"{dataset}.jsonl, from the data.zip of the LongBench data set"
    if data_dir is None:
        raise ValueError(f"{dataset} needs data_dir=DIR, a folder that holds {source}")
    path = Path(data_dir) / f"{dataset}.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"data_dir={data_dir} is not a folder; {dataset} needs one that holds {source}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; put there {source}")
    return path


def _read_jsonl(path: Path, max_samples: int | None) -> list[Row]:
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    # Iterating over the bytes ends lines at \n only: str.splitlines would also cut at a U+2028 inside a text.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if len(rows) == max_samples:
                break
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _parse_line(line, where)
            if row.id in line_of_id:
                raise ValueError(f"{where}: _id {row.id!r} was already used in line {line_of_id[row.id]}")
            line_of_id[row.id] = number
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows")
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
