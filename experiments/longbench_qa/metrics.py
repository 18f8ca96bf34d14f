"""LongBench v1 scores (arXiv 2308.14508), equal to the published ones to two decimals.

Inside this module a score is a fraction 0-1; the two public functions return 0-100.
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
    "demo_qa": qa_f1,
    "narrativeqa": qa_f1,
    "qasper": qa_f1,
    "multifieldqa_en": qa_f1,
    "multifieldqa_zh": qa_f1_zh,
    "hotpotqa": qa_f1,
    "2wikimqa": qa_f1,
    "musique": qa_f1,
    "dureader": rouge_l_zh,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": rouge_l_zh,
    "trec": classification,
    "triviaqa": qa_f1,
    "samsum": rouge_l,
    "lsht": classification,
    "passage_count": number_match,
    "passage_retrieval_en": partial(retrieval, label="Paragraph "),
    "passage_retrieval_zh": partial(retrieval, label="段落"),
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
FIRST_LINE_ONLY = frozenset({"trec", "triviaqa", "samsum", "lsht"})


def score_sample(
    dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """The prediction's best score over the reference answers, 0-100.

    `all_classes` is needed for trec and lsht only.
    Raises ValueError for an unknown data set or missing classes.
    """
    return 100 * _best(dataset, prediction, answers, all_classes)


def score_dataset(
    dataset: str,
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    all_classes: Sequence[str] | None = None,
) -> float:
    """Mean of the samples' scores, 0-100, not rounded. `answers` holds one list of references a prediction.

    Raises ValueError for an unknown data set, no predictions, or another number of answers than predictions.
    """
    if not predictions or len(predictions) != len(answers):
        given = f"{len(predictions)} predictions and {len(answers)} lists of answers"
        raise ValueError(f"{dataset}: got {given}; need at least one, and as many of each")
    total = sum(_best(dataset, *sample, all_classes) for sample in zip(predictions, answers, strict=True))
    return 100 * total / len(predictions)


def _best(dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None) -> float:
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
