import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.longbench_qa.data import DEMO, LONGBENCH, LONGBENCH_E
from experiments.longbench_qa.metrics import FIRST_LINE_ONLY, METRICS, score_by_length, score_dataset, score_sample


def approx(value: float) -> Any:
    return pytest.approx(value, abs=1e-4)  # the rouge package adds 1e-8 to a denominator


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The  Bell-Tower, obviously!", "a belltower obviously", 100),
        ("in the bell tower", "bell tower", 80),  # precision 2/3, recall 1
        ("tower tower", "bell tower", 50),  # a word counts as often as it is in both
        ("U.S.A.", "usa", 100),
        ("nothing of it", "bell tower", 0),
        ("", "bell tower", 0),
        ("the", "a", 0),  # no words are left on either side
    ],
)
def test_english_f1(prediction: str, answer: str, score: float) -> None:
    assert score_sample("hotpotqa", prediction, [answer]) == approx(score)
    assert score_sample(DEMO, prediction, [answer]) == approx(score)


def test_articles_end_at_any_non_letter() -> None:
    # A dash that is not ASCII is no punctuation here, yet it ends the word "the".
    assert score_sample("qasper", "the\u2013end", ["\u2013end"]) == 100


def test_chinese_f1() -> None:
    assert score_sample("multifieldqa_zh", "北京大学。", ["北京大学"]) == 100
    assert score_sample("multifieldqa_zh", "我爱北京", ["北京"]) == approx(50)  # 我 / 爱 / 北京
    assert score_sample("multifieldqa_zh", "\u201cYes\uff01\u201d", ["yes"]) == 100
    # This opening bracket is not among the marks that LongBench drops: a word of its own.
    assert score_sample("multifieldqa_zh", "\u300ayes", ["yes"]) == approx(200 / 3)
    assert score_sample("multifieldqa_zh", "。", ["北京"]) == 0


def test_rouge_l() -> None:
    assert score_sample("qmsum", "the cat sat", ["the cat ran"]) == approx(200 / 3)
    assert score_sample("qmsum", "a c b", ["a b c"]) == approx(200 / 3)
    assert score_sample("gov_report", "same text", ["same text"]) == approx(100)


@pytest.mark.parametrize("nothing", ["", ".", "..."])
def test_rouge_l_of_nothing(nothing: str) -> None:
    assert score_sample("multi_news", nothing, ["some text"]) == 0
    assert score_sample("multi_news", "some text", [nothing]) == 0
    assert score_sample("vcsum", nothing, ["文字"]) == 0


def test_rouge_l_does_not_depend_on_the_recursion_limit() -> None:
    limit = sys.getrecursionlimit()
    words = [f"w{i}" for i in range(limit)]
    assert score_sample("qmsum", " ".join(words), [" ".join(reversed(words))]) > 0
    assert sys.getrecursionlimit() == limit


def test_chinese_rouge_l() -> None:
    assert score_sample("dureader", "我爱北京", ["我爱上海"]) == approx(200 / 3)
    assert score_sample("vcsum", "我爱北京", ["我爱北京"]) == approx(100)


def test_classification() -> None:
    classes = ["Food", "Date", "Event", "Other Event", "Order, rank"]

    def score(prediction: str, answer: str) -> float:
        return score_sample("trec", prediction, [answer], classes)

    assert score("Type: Food", "Food") == 100
    assert score("Food or Date", "Food") == 50
    assert score("food", "Food") == 0
    assert score("Date", "Food") == 0
    assert score("", "Food") == 0
    # A class whose name is part of the right one's does not count against it.
    assert score("Other Event", "Other Event") == 100
    # The other way round both count.
    assert score("Other Event", "Event") == 50
    # Of two such classes in a row LongBench drops the first only.
    assert score_sample("trec", "New York", ["New York"], ["New", "York", "New York"]) == 50
    with pytest.raises(ValueError, match="lsht is scored by class names"):
        score_sample("lsht", "教育", ["教育"])


def test_numbers() -> None:
    assert score_sample("passage_count", "There are 7 of 12.", ["7"]) == 50
    assert score_sample("passage_count", "7, 7 and 8", ["7"]) == approx(200 / 3)
    assert score_sample("passage_count", "07", ["7"]) == 0
    assert score_sample("passage_count", "seven", ["7"]) == 0
    assert score_sample("passage_retrieval_en", "Paragraph 15", ["Paragraph 15"]) == 100
    assert score_sample("passage_retrieval_en", "Number 15, not 1", ["Paragraph 15"]) == 50
    assert score_sample("passage_retrieval_zh", "段落3", ["段落3"]) == 100
    assert score_sample("passage_retrieval_zh", "", ["段落3"]) == 0
    with pytest.raises(ValueError, match="answer '15' should hold 'Paragraph ' and a number"):
        score_sample("passage_retrieval_en", "15", ["15"])


def test_code_similarity() -> None:
    assert score_sample("lcc", "\n\nx = 1\ny = 2", ["x = 1"]) == 100
    assert score_sample("lcc", "```python\n# say it\n// or so\nx = 1", ["x = 1"]) == 100
    assert score_sample("lcc", "# only a comment", ["x = 1"]) == 0
    # 2 * 2 letters in common of 6: 0.667, rounded to a percent.
    assert score_sample("repobench-p", "abc", ["abd"]) == 67


@pytest.mark.parametrize("name", sorted(FIRST_LINE_ONLY))
def test_first_line(name: str) -> None:
    assert score_sample(name, "\n\nFood\nDate", ["Food"], ["Food", "Date"]) == approx(100)


def test_later_lines_count_elsewhere() -> None:
    assert score_sample("hotpotqa", "Food\nDate", ["Food"]) == approx(200 / 3)


def test_best_reference_counts() -> None:
    assert score_sample("triviaqa", "fifty-five", ["55", "fifty-five"]) == 100


def test_mean_is_not_rounded() -> None:
    score = score_dataset("hotpotqa", ["tower", "x", "x"], [["bell tower"], ["a"], ["b"]], None)
    assert score == pytest.approx(200 / 9, abs=1e-12)


def test_every_data_set_has_a_metric() -> None:
    assert set(METRICS) == {*LONGBENCH, DEMO}
    for name in LONGBENCH_E:
        answer = "Paragraph 3" if name == "passage_retrieval_en_e" else "3"
        assert score_sample(name, answer, [answer], [answer]) == approx(100)


@pytest.mark.parametrize("call", [score_sample, score_dataset])
def test_unknown_data_set(call: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match="unknown data set 'narrativeqa_e'"):
        call("narrativeqa_e", ["x"], [["x"]], None)


@pytest.mark.parametrize(("predictions", "answers"), [([], []), (["x"], [])])
def test_counts_must_agree(predictions: list[str], answers: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and 0 lists"):
        score_dataset("hotpotqa", predictions, answers, None)


def test_scores_by_length() -> None:
    predictions = ["a1", "x", "a1", "x", "x", "a1"]
    lengths = [3999, 0, 4000, 7999, 8000, 120_000]
    scores = score_by_length("hotpotqa_e", predictions, [["a1"]] * 6, lengths)
    assert list(scores) == ["0-4k", "4-8k", "8k+"]
    assert list(scores.values()) == [50, 50, 50]
    assert score_by_length("hotpotqa_e", ["a1"], [["a1"]], [3999]) == {"0-4k": 100}
    assert score_by_length("hotpotqa_e", ["a1"], [["a1"]], [4000]) == {"4-8k": 100}
    assert score_by_length("hotpotqa_e", ["a1", "x"], [["a1"]] * 2, [8000, 7999]) == {"4-8k": 0, "8k+": 100}
    assert score_by_length("trec_e", ["Food\nDate"], [["Food"]], [9], ["Food", "Date"]) == {"0-4k": 100}
    assert score_by_length("hotpotqa_e", [], [], []) == {}


@pytest.mark.parametrize(("n_answers", "n_lengths"), [(2, 1), (1, 2)])
def test_scores_by_length_need_as_many_of_each(n_answers: int, n_lengths: int) -> None:
    with pytest.raises(ValueError, match=f"1 predictions, {n_answers} lists of answers and {n_lengths} lengths"):
        score_by_length("lcc_e", ["x"], [["x"]] * n_answers, [1] * n_lengths)


def test_import_is_light_and_jieba_quiet() -> None:
    code = (
        "import sys; from experiments.longbench_qa import metrics as m\n"
        "assert not {'jieba', 'rouge', 'rapidfuzz', 'torch'} & set(sys.modules)\n"
        "m.score_sample('multifieldqa_zh', '北京', ['北京'])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ROUGE of long summaries takes seconds; qmsum, samsum and dureader have the same metrics.
LONG = ("gov_report", "multi_news", "vcsum")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in LONGBENCH]
)
def test_score_of_a_real_model(longbench: Path, name: str) -> None:
    folder = longbench / "predictions" / "llama2-7b-chat-4k"
    expected = json.loads((folder / "expected.json").read_text())
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    predictions, answers = [row["pred"] for row in rows], [row["answers"] for row in rows]
    assert round(score_dataset(name, predictions, answers, rows[-1]["all_classes"]), 2) == expected[name]
