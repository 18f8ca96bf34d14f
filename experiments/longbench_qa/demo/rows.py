"""demo_qa as text: rows in LongBench's format."""

from typing import Any

import torch
from torch import Tensor

from experiments.longbench_qa.demo.files import FILES
from experiments.longbench_qa.demo.language import HEADER, SENTENCE, Contexts
from experiments.longbench_qa.demo.words import WORDS

SEED = 20240229
SENTENCES = 8  # of a passage
PASSAGES = {512: 7, 1024: 14, 2048: 30, 4096: 60}  # of a prompt of about so many tokens
DEPTHS = {"one_fact_early": (0, 1 / 3), "one_fact_middle": (1 / 3, 2 / 3), "one_fact_late": (2 / 3, 1)}
EVALUATED = (*DEPTHS, "two_hop", "list", "passage")
ROWS = 200  # of a family and length
NO_SPACE_BEFORE = {"'s", ".", "?", ":", ","}


def evaluation_rows(family: str, length: int, first: int = 0, count: int = ROWS) -> list[dict[str, Any]]:
    """Held-out rows `first` to `first + count - 1` of a family, at about `length` tokens a prompt.

    LongBench's keys, and `answer_span`: [start, end) characters of the answer in the context; `evidence_spans`: those
    of the sentences that answer, in the order of the hops. `input` ends where the answer begins; `length` counts words.
    """
    if family not in EVALUATED or length not in PASSAGES:
        raise ValueError(f"{family!r} at {length}: known are {', '.join(EVALUATED)} at {', '.join(map(str, PASSAGES))}")
    numbers = torch.arange(first, first + count)
    # Families and lengths draw apart: no two share a context.
    apart = (EVALUATED.index(family) * len(PASSAGES) + list(PASSAGES).index(length)) * 2**20
    contexts = Contexts(SEED, numbers + apart, PASSAGES[length], SENTENCES, held_out=True)
    kind = "one_fact" if family in DEPTHS else family
    if family in DEPTHS:
        low, high = (int(depth * PASSAGES[length] * SENTENCES) for depth in DEPTHS[family])
        contexts.move(contexts.asked(kind, 1)[:, 0, 0], low + numbers * 7919 % (high - low))
    ids, questions = contexts.ids, contexts.ask(kind)
    rows = []
    for i, number in enumerate(numbers.tolist()):
        context, spans = _context(ids[i])
        evidence = [_sentence_span(spans, slot) for slot in questions.evidence[i, 0].tolist()]
        answer = _text(_words(questions.answers[i, 0])[:-1])
        if family == "passage":
            start, end = spans[int(questions.evidence[i, 0, 0]) // SENTENCES * (HEADER + SENTENCES * SENTENCE) + 1]
        else:
            end = evidence[-1][1] - len(".")
            start = end - len(answer)
        assert context[start:end] == answer
        rows.append(
            {
                "input": _text(_words(questions.prompts[i, 0])),
                "context": context,
                "answers": [answer],
                "length": len(context.split()),
                "dataset": next(name for name, (tokens, _) in FILES.items() if tokens == length),
                "language": "en",
                "all_classes": None,
                "_id": f"{family}-{length}-{number:03d}",
                "answer_span": [start, end],
                "evidence_spans": [list(span) for span in evidence],
            }
        )
    return rows


def _words(ids: Tensor) -> list[str]:
    return [WORDS[i] for i in ids.tolist()]


def _text(words: list[str]) -> str:
    return "".join(word if word in NO_SPACE_BEFORE else f" {word}" for word in words).removeprefix(" ")


def _context(ids: Tensor) -> tuple[str, list[tuple[int, int]]]:
    """A line a passage, without <bos>; and the characters of each token."""
    text, spans = "", []
    per_passage = HEADER + SENTENCES * SENTENCE
    for place, word in enumerate(_words(ids[1:])):
        if text and word not in NO_SPACE_BEFORE:
            text += "\n" if place % per_passage == 0 else " "
        spans.append((len(text), len(text) + len(word)))
        text += word
    return text, spans


def _sentence_span(spans: list[tuple[int, int]], slot: int) -> tuple[int, int]:
    """Characters of the sentence in a slot."""
    first = slot // SENTENCES * (HEADER + SENTENCES * SENTENCE) + HEADER + slot % SENTENCES * SENTENCE
    return spans[first][0], spans[first + SENTENCE - 1][1]
