import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.longbench_qa import prompts as prompts_module
from experiments.longbench_qa.data import DEMO, LONGBENCH, LONGBENCH_E, load_rows
from experiments.longbench_qa.prompts import choose_prompts, fill_template, load_prompt, load_template
from experiments.longbench_qa.sources import OFFICIAL_PROMPTS, Provenance


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
    assert template == "{context}\n{input}"
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
    with pytest.raises(ValueError, match=r"absent\.json does not exist"):
        load_template("lcc", str(tmp_path / "absent.json"))
    (tmp_path / "latin.json").write_bytes(b'{"lcc": "\xe9"}')
    with pytest.raises(ValueError, match=r"latin\.json is not UTF-8"):
        load_template("lcc", str(tmp_path / "latin.json"))


def test_where_a_prompt_comes_from(tmp_path: Path) -> None:
    prompts_file = write(tmp_path, {"lcc": "Ü {context}", "qasper": "{context}"})
    template, provenance = load_prompt("lcc", prompts_file)
    assert provenance == Provenance("file", hashlib.sha256(template.encode()).hexdigest())
    assert load_prompt("lcc", prompts_file, prompts="file") == (template, provenance)
    template, provenance = load_prompt(DEMO)
    assert provenance == Provenance("builtin", hashlib.sha256(template.encode()).hexdigest())
    assert load_prompt(DEMO, prompts="builtin") == (template, provenance)


@pytest.mark.parametrize(
    ("dataset", "prompts", "prompts_file", "message"),
    [
        ("lcc", "builtin", None, "prompts=builtin is not for lcc, allowed is official, file"),
        ("lcc", "builtin", "p.json", "prompts=builtin is not for lcc"),
        (DEMO, "official", None, "prompts=official is not for demo_qa, allowed is builtin"),
        (DEMO, "file", "p.json", "prompts=file is not for demo_qa, allowed is builtin"),
        (DEMO, "builtin", "p.json", r"prompts=builtin does not read prompts_file=p\.json"),
        ("lcc", "file", None, "prompts=file needs prompts_file=PATH"),
        ("lcc", "official", "p.json", r"prompts=official does not read prompts_file=p\.json"),
        ("lcc", "offical", None, "prompts='offical', allowed is one of official, file, builtin"),
    ],
)
def test_prompts_that_do_not_fit(dataset: str, prompts: str, prompts_file: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_prompt(dataset, prompts_file, prompts)
    assert "\n" not in str(caught.value)


def test_prompts_that_fit() -> None:
    assert choose_prompts("demo_qa_512", None, "p.json") == choose_prompts(DEMO, "builtin", None) == "builtin"
    assert choose_prompts("lcc_e", None, None) == choose_prompts("lcc_e", "official", None) == "official"
    assert choose_prompts("lcc_e", None, "p.json") == choose_prompts("lcc_e", "file", "p.json") == "file"
    with pytest.raises(ValueError, match="unknown data set 'nope'"):
        choose_prompts("nope", None, None)


def test_official_prompts_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = replace(OFFICIAL_PROMPTS, url="http://127.0.0.1:9/dataset2prompt.json")
    monkeypatch.setattr(prompts_module, "OFFICIAL_PROMPTS", nowhere)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ValueError, match=r"cannot download http://127\.0\.0\.1:9/dataset2prompt\.json to ") as caught:
        load_prompt("lcc_e", cache_dir=str(tmp_path))
    assert str(tmp_path / nowhere.name) in str(caught.value)
    assert str(caught.value).endswith("put the file there by hand, or give prompts_file=PATH, a copy of it elsewhere")


def test_official_prompts_in_the_cache(tmp_path: Path, longbench: Path) -> None:
    cached = tmp_path / OFFICIAL_PROMPTS.name
    cached.parent.mkdir(parents=True)
    prompts_file = longbench / "config" / "dataset2prompt.json"
    cached.write_bytes(prompts_file.read_bytes())
    for name in (*LONGBENCH, *LONGBENCH_E):
        template, provenance = load_prompt(name, cache_dir=str(tmp_path))
        assert load_prompt(name, prompts="official", cache_dir=str(tmp_path)) == (template, provenance)
        assert load_prompt(name, str(prompts_file)) == (template, Provenance("file", provenance.sha256))
        assert provenance.source == OFFICIAL_PROMPTS.url


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
