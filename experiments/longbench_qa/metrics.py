"""LongBench v1 scores (arXiv 2308.14508), equal to the published ones to two decimals.

Inside this module a score is a fraction 0-1; the three public functions return 0-100.
"""

import logging
import re
import string
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from experiments.longbench_qa.data import base_name

Texts = Sequence[str]
NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
# Punctuation of Chinese answers beside ASCII's. A few marks are not in it (U+300A, U+FF0E, U+00B7): LongBench
# leaves them in the text, and scores must agree.
ZH_PUNCTUATION = re.compile(
    "[\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f"
    "\ufe4f\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over the two bags of tokens, as in SQuAD (arXiv 1606.05250)."""
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str) -> float:
    """Token F1 over words in lower case, without ASCII punctuation and English articles."""
    return token_f1(_english_words(prediction), _english_words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """Token F1 over the words that jieba finds, in lower case, punctuation and blanks dropped."""
    return token_f1(_chinese_words(prediction), _chinese_words(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L F of the `rouge` package (sentences end at "."); 0 if either text has no sentence."""
    # The package walks the common subsequence by recursion, at most one call a word. At Python's own limit a
    # long sentence would fail or not, depending on how deep the caller is.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + len(prediction.split()) + len(answer.split()))
    try:
        return float(_rouge().get_scores([prediction], [answer])[0]["rouge-l"]["f"])
    except ValueError:  # raised for a text without a sentence
        return 0.0
    finally:
        sys.setrecursionlimit(limit)


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L over the words that jieba finds."""
    return rouge_l(" ".join(_jieba().cut(prediction)), " ".join(_jieba().cut(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1/n if the answer is among the n class names that the prediction mentions, else 0.

    A name that is part of the answer's own name ("person" in "group of person") is not counted.
    """
    mentioned = [name for name in classes if name in prediction]
    position = 0
    while position < len(mentioned):
        if mentioned[position] in answer and mentioned[position] != answer:
            # The next name moves here and is passed over unchecked: LongBench's scores come out that way.
            del mentioned[position]
        position += 1
    return 1 / len(mentioned) if answer in mentioned else 0.0


def number_match(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the answer, compared as written ("08" is not "8")."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, label: str) -> float:
    """`number_match` for the number after `label` in the answer. Raises ValueError if there is none."""
    found = re.search(rf"{label}(\d+)", answer)
    if found is None:
        raise ValueError(f"answer {answer!r} should hold {label!r} and a number")
    return number_match(prediction, found.group(1))


def code_similarity(prediction: str, answer: str) -> float:
    """Indel similarity, rounded to a percent, of the answer and the prediction's first line of code.

    A line with a backquote, "#" or "//" is taken for a comment or a fence; no other line: an empty text.
    """
    from rapidfuzz.distance import Indel

    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * Indel.normalized_similarity(code, answer)) / 100


METRICS: dict[str, Callable[..., float]] = {
    **dict.fromkeys(("demo_qa", "narrativeqa", "qasper", "multifieldqa_en", "triviaqa"), qa_f1),
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), qa_f1),
    "multifieldqa_zh": qa_f1_zh,
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    **dict.fromkeys(("dureader", "vcsum"), rouge_l_zh),
    **dict.fromkeys(("trec", "lsht"), classification),
    "passage_count": number_match,
    "passage_retrieval_en": partial(retrieval, label="Paragraph "),
    "passage_retrieval_zh": partial(retrieval, label="段落"),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
FIRST_LINE_ONLY = frozenset({"trec", "triviaqa", "samsum", "lsht"})
LENGTHS = {"0-4k": range(4000), "4-8k": range(4000, 8000), "8k+": range(8000, sys.maxsize)}  # LongBench-E


def score_sample(dataset: str, prediction: str, answers: Texts, all_classes: Texts | None = None) -> float:
    """The prediction's best score over the reference answers, 0-100.

    `all_classes` is needed for trec and lsht only. Raises ValueError for an unknown data set or missing classes.
    """
    return 100 * _best(dataset, prediction, answers, all_classes)


def score_dataset(
    dataset: str, predictions: Texts, answers: Sequence[Texts], all_classes: Texts | None = None
) -> float:
    """Mean of the samples' scores, 0-100, not rounded. `answers` holds one list of references a prediction.

    Raises ValueError for an unknown data set, no predictions, or another number of answers than predictions.
    """
    if not predictions or len(predictions) != len(answers):
        given = f"{len(predictions)} predictions and {len(answers)} lists of answers"
        raise ValueError(f"{dataset}: got {given}; need at least one, and as many of each")
    total = sum(_best(dataset, *sample, all_classes) for sample in zip(predictions, answers, strict=True))
    return 100 * total / len(predictions)


def score_by_length(
    dataset: str, predictions: Texts, answers: Sequence[Texts], lengths: Sequence[int], all_classes: Texts | None = None
) -> dict[str, float]:
    """`score_dataset` of each bucket of LongBench-E, by the rows' own `length`. A bucket without rows is absent.

    Raises ValueError as `score_dataset` does, but for no predictions, and for another number of lengths.
    """
    if not len(predictions) == len(answers) == len(lengths):
        given = f"{len(predictions)} predictions, {len(answers)} lists of answers and {len(lengths)} lengths"
        raise ValueError(f"{dataset}: got {given}; need as many of each")
    buckets = {name: [i for i, length in enumerate(lengths) if length in span] for name, span in LENGTHS.items()}
    return {
        name: score_dataset(dataset, [predictions[i] for i in rows], [answers[i] for i in rows], all_classes)
        for name, rows in buckets.items()
        if rows
    }


def _best(dataset: str, prediction: str, answers: Texts, all_classes: Texts | None) -> float:
    name = base_name(dataset)
    metric = METRICS[name]
    if metric is classification:
        if not all_classes:
            raise ValueError(f"{dataset} is scored by class names: all_classes is needed")
        metric = partial(classification, classes=all_classes)
    if name in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((metric(prediction, answer) for answer in answers), default=0.0)


def _english_words(text: str) -> list[str]:
    # The order matters: "U.S.A." must become "usa" before anything is taken for the article "a".
    return re.sub(r"\b(?:an?|the)\b", " ", text.lower().translate(NO_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = (ZH_PUNCTUATION.sub("", word.lower().translate(NO_PUNCTUATION)) for word in _jieba().cut(text))
    return [word for word in ("".join(word.split()) for word in words) if word]


@cache
def _jieba() -> Any:
    with warnings.catch_warnings():  # it uses a deprecated part of setuptools
        warnings.simplefilter("ignore")
        import jieba  # type: ignore[import-untyped, unused-ignore]

    jieba.setLogLevel(logging.CRITICAL)  # else it reports to stderr that it builds its dictionary
    return jieba


@cache
def _rouge() -> Any:
    from rouge import Rouge  # type: ignore[import-untyped, unused-ignore]

    return Rouge(metrics=["rouge-l"])
