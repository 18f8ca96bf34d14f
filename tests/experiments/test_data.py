import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from experiments.longbench_qa.data import BUILT_IN, DEMO, LONGBENCH, LONGBENCH_E, Row, base_name, load_data, load_rows
from experiments.longbench_qa.demo.files import FILES, LONG_TEXT, SHA256
from experiments.longbench_qa.sources import Provenance

CONF = Path(__file__).resolve().parents[2] / "conf"
NO_CHAT_TEMPLATE = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}


def fields(**changes: Any) -> dict[str, Any]:
    row = {
        "_id": "a1",
        "input": "Who?",
        "context": "Ines \u2028 did.",
        "answers": ["Ines"],
        "length": 2,
        "dataset": "hotpotqa",
        "language": "en",
        "all_classes": None,
    }
    return row | changes


def write(folder: Path, *lines: str, dataset: str = "hotpotqa", end: str = "\n") -> str:
    (folder / f"{dataset}.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return str(folder)


def line(**changes: Any) -> str:
    # ensure_ascii=False leaves the U+2028 in the file as it is: it must not end a line.
    return json.dumps(fields(**changes), ensure_ascii=False)


def without(key: str) -> str:
    return json.dumps({name: value for name, value in fields().items() if name != key})


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_names() -> None:
    assert len(LONGBENCH) == len(set(LONGBENCH)) == 21
    assert len(LONGBENCH_E) == len(set(LONGBENCH_E)) == 13
    assert {base_name(name) for name in LONGBENCH_E} < set(LONGBENCH)
    assert {base_name(name) for name in BUILT_IN} == {DEMO}


@pytest.mark.parametrize("name", ["hotpot", "narrativeqa_e", "demo_qa_e", "qasper_e_e", ""])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown data set .*; known: demo_qa_512, demo_qa, .*, narrativeqa"):
        load_rows(name, None, None)


def test_rows(tmp_path: Path) -> None:
    data_dir = write(tmp_path, line(), line(_id="b", all_classes=["x", "y"]), end="\n\n")
    rows = load_rows("hotpotqa", data_dir, None)
    assert rows[0] == Row("a1", "Who?", "Ines \u2028 did.", ["Ines"], 2, "hotpotqa", "en", None)
    assert rows[1].id == "b"
    assert rows[1].all_classes == ["x", "y"]
    assert len(rows) == 2
    assert load_rows("hotpotqa", data_dir, 1) == rows[:1]
    assert load_rows("hotpotqa", data_dir, 9) == rows


def test_last_line_without_newline_and_windows_line_ends(tmp_path: Path) -> None:
    data_dir = write(tmp_path, line() + "\r", line(_id="b"), end="")
    assert [row.id for row in load_rows("hotpotqa", data_dir, None)] == ["a1", "b"]


@pytest.mark.parametrize("max_samples", [0, -1])
def test_max_samples(max_samples: int) -> None:
    with pytest.raises(ValueError, match=f"max_samples is {max_samples}; allowed"):
        load_rows(DEMO, None, max_samples)


def test_demo_needs_no_data_dir() -> None:
    rows = load_rows(DEMO, None, None)
    assert len(rows) == 1200 and {row.dataset for row in rows} == {DEMO}
    assert [row.id for row in load_rows(DEMO, None, 2)] == ["one_fact_early-1024-000", "one_fact_middle-1024-000"]
    assert all(row.context[slice(*row.answer_span)] == row.answers[0] for row in rows if row.answer_span)


def test_where_the_file_should_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data_dir=.*nowhere is not a folder; qasper needs .*qasper\.jsonl"):
        load_rows("qasper", str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match=r"qasper\.jsonl does not exist; put there qasper\.jsonl"):
        load_rows("qasper", str(tmp_path), None)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"_id": "b",', "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        (without("context"), "key 'context' is missing"),
        (without("all_classes"), "key 'all_classes' is missing"),
        (line(_id=7), "'_id' must be of type str, got int"),
        (line(length="2"), "'length' must be of type int, got str"),
        (line(length=True), "'length' must be of type int, got bool"),
        (line(answers="Ines"), "'answers' must be of type list, got str"),
        (line(answers=[]), "'answers' must be a list of one or more strings"),
        (line(answers=["Ines", None]), "'answers' must be a list of one or more strings"),
        (line(all_classes=[1]), "'all_classes' must be a list of one or more strings"),
        (line(), "_id 'a1' was already used in line 1"),
        (line(answer_span=[0, "1"]), "'answer_span' must be a list of two integers"),
        (line(answer_span=[0]), "'answer_span' must be a list of two integers"),
        (line(answer_span=[2, 2]), r"'answer_span' \[2, 2\] is not inside the context's"),
        (line(answer_span=[0, 9999]), r"'answer_span' \[0, 9999\] is not inside the context's"),
    ],
)
def test_bad_line(tmp_path: Path, bad: str, message: str) -> None:
    data_dir = write(tmp_path, line(), "", bad)
    with pytest.raises(ValueError, match=rf"hotpotqa\.jsonl, line 3: {message}") as caught:
        load_rows("hotpotqa", data_dir, None)
    assert "\n" not in str(caught.value)
    # What lies behind the rows asked for is not looked at.
    assert len(load_rows("hotpotqa", data_dir, 1)) == 1


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "lcc.jsonl").write_bytes(b'{"_id": "\xff"}\n')
    with pytest.raises(ValueError, match=r"lcc\.jsonl, line 1: not UTF-8"):
        load_rows("lcc", str(tmp_path), None)


def test_where_rows_come_from(tmp_path: Path) -> None:
    data_dir = write(tmp_path, line(), line(_id="b"))
    rows, provenance = load_data("hotpotqa", data_dir, 1)
    assert len(rows) == 1
    # The whole file's, so that it says which file it was.
    assert provenance == Provenance("folder", sha256((tmp_path / "hotpotqa.jsonl").read_bytes()))


def test_where_the_demo_comes_from() -> None:
    rows, provenance = load_data(DEMO, None, 2)
    assert len(rows) == 2
    assert provenance == Provenance("builtin", FILES[DEMO][1])


def test_long_texts_are_long_in_any_tokenizer(tmp_path: Path) -> None:
    rows, provenance = load_data(LONG_TEXT, None, None, str(tmp_path))
    assert [file.name for file in (tmp_path / "demo_qa").iterdir()] == [f"long_text-{provenance.sha256[:7]}.jsonl"]
    assert provenance == Provenance("builtin", SHA256[LONG_TEXT])
    assert len(rows) == len({row.context for row in rows}) == 8
    for row in rows:
        assert len(row.context.split()) >= 2**17
        assert row.answer_span is not None and row.context[slice(*row.answer_span)] == row.answers[0]
        # A prompt of 300 characters that lost its middle still has it, and the fact answers the question.
        assert row.answer_span[1] < 150
        assert f"{row.input.partition('Answer: ')[2]} {row.answers[0]}." in row.context
        assert row.dataset == LONG_TEXT


def test_a_built_in_set_need_not_be_stored(tmp_path: Path) -> None:
    found = load_data("demo_qa_512", None, 3, str(tmp_path), store=False)
    assert not list(tmp_path.iterdir())
    assert found == load_data("demo_qa_512", None, 3, str(tmp_path))
    assert found == load_data("demo_qa_512", None, 3, str(tmp_path), store=False)


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hotpotqa\.jsonl holds no rows"):
        load_rows("hotpotqa", write(tmp_path), None)


def test_real_rows(longbench: Path) -> None:
    files = sorted((longbench / "data").glob("*.jsonl"))
    assert files
    for file in files:
        rows = load_rows(file.stem, str(file.parent), None)
        assert len(rows) == file.read_bytes().count(b"\n")
        assert {row.dataset for row in rows} == {file.stem}


@pytest.mark.parametrize("name", [*LONGBENCH, *LONGBENCH_E, *BUILT_IN])
def test_config(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        dataset = compose(f"dataset/{name}").dataset
    base = base_name(name)
    assert set(dataset) == {"name", "max_new_tokens", "chat_template", "stop_at_newline"}
    assert dataset.name == name
    assert dataset.chat_template is (base not in NO_CHAT_TEMPLATE)
    assert dataset.stop_at_newline is (base == "samsum")
    assert dataset.max_new_tokens >= (12 if base == DEMO else 16)


def test_config_lengths_are_the_authors(longbench: Path) -> None:
    lengths = json.loads((longbench / "config" / "dataset2maxlen.json").read_text())
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ours = {name: compose(f"dataset/{name}").dataset.max_new_tokens for name in LONGBENCH}
    assert ours == lengths


def test_one_config_a_set() -> None:
    assert {file.stem for file in (CONF / "dataset").glob("*.yaml")} == {*LONGBENCH, *LONGBENCH_E, *BUILT_IN}
