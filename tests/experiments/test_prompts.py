import json
from pathlib import Path

import pytest

from experiments.longbench_qa.data import DEMO, LONGBENCH, LONGBENCH_E, load_rows
from experiments.longbench_qa.prompts import fill_template, load_template


def write(folder: Path, content: object) -> str:
    file = folder / "prompts.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(file)


def test_fill() -> None:
    prompt = fill_template("Text: {context}\nQ: {input}\nA:", "It rained.", "Did it rain?")
    assert prompt.text == "Text: It rained.\nQ: Did it rain?\nA:"
    assert prompt.text[prompt.context_start : prompt.context_end] == "It rained."


def test_question_before_context() -> None:
    prompt = fill_template("{input} {context} {input}", "ctx", "question")
    assert prompt.text == "question ctx question"
    assert prompt.text[prompt.context_start : prompt.context_end] == "ctx"


def test_no_question_in_template() -> None:
    assert fill_template("Sum up: {context}", "ctx", "never shown").text == "Sum up: ctx"


@pytest.mark.parametrize("context", ["{input}", "{context}", "{}", "{0} {x!r:>{y}}", "}{", "{{input}}", ""])
@pytest.mark.parametrize("question", ["{input}", "{context}", "{", "%s \\1"])
def test_braces_of_a_row_are_text(context: str, question: str) -> None:
    prompt = fill_template("<{context}|{input}>", context, question)
    assert prompt.text == "<" + context + "|" + question + ">"
    assert prompt.text[prompt.context_start : prompt.context_end] == context


def test_other_braces_of_the_template_are_text() -> None:
    assert fill_template("{a} {{}} {context} {", "c", "q").text == "{a} {{}} c {"


@pytest.mark.parametrize(("template", "count"), [("Q: {input}", 0), ("{context} {context}", 2)])
def test_context_must_be_there_once(tmp_path: Path, template: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"once, this one has {count}"):
        fill_template(template, "c", "q")
    with pytest.raises(ValueError, match=f"'lcc' must hold {{context}} once, it holds it {count} times"):
        load_template("lcc", write(tmp_path, {"lcc": template}))


def test_demo_has_its_own(tmp_path: Path) -> None:
    template = load_template(DEMO, None)
    assert template.count("{context}") == 1
    assert template.endswith("Question: {input}\nAnswer:")
    assert load_template(DEMO, str(tmp_path / "absent.json")) == template


def test_e_sets_use_the_plain_sets_template(tmp_path: Path) -> None:
    prompts_file = write(tmp_path, {"qasper": "Q {context}"})
    assert load_template("qasper_e", prompts_file) == load_template("qasper", prompts_file) == "Q {context}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lcc": ', "is not JSON: .* line 1, column"),
        (["lcc"], "must hold one JSON object of templates, got list"),
        ({"qasper": "{context}"}, "has no key 'lcc', needed for lcc_e; it has: qasper"),
        ({}, "has no key 'lcc', needed for lcc_e; it has: nothing"),
        ({"lcc": None}, "'lcc' must be a string, got NoneType"),
    ],
)
def test_bad_prompts_file(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"prompts\.json:? {message}"):
        load_template("lcc_e", write(tmp_path, content))


def test_missing_prompts_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lcc needs prompts_file=PATH.*dataset2prompt\.json"):
        load_template("lcc", None)
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        load_template("lcc", str(tmp_path / "absent.json"))
    (tmp_path / "latin.json").write_bytes(b'{"lcc": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8"):
        load_template("lcc", str(tmp_path / "latin.json"))


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match="unknown data set 'nope'"):
        load_template("nope", None)


def test_real_rows_fill_real_templates(longbench: Path) -> None:
    prompts_file = str(longbench / "config" / "dataset2prompt.json")
    for name in (*LONGBENCH, *LONGBENCH_E):
        template = load_template(name, prompts_file)
        if not (longbench / "data" / f"{name}.jsonl").is_file():
            continue
        for row in load_rows(name, str(longbench / "data"), 5):
            prompt = fill_template(template, row.context, row.input)
            assert prompt.text[prompt.context_start : prompt.context_end] == row.context
            asked = row.input if "{input}" in template else ""
            braces = len("{context}") + (len("{input}") if asked else 0)
            assert len(prompt.text) == len(template) - braces + len(row.context) + len(asked)
