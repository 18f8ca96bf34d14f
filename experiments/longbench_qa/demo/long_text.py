"""The data set `long_text`: prompts of 128 Ki tokens and more in any tokenizer, for time and memory by prompt length.

The words are demo_qa's. Near its start a text has one fact, which is asked for; all else are sentences that say nothing
and are nothing like it. That is no test of a model, and the score of one with random weights means nothing at all.
"""

from typing import Any

import torch

from experiments.longbench_qa.demo.dice import Dice
from experiments.longbench_qa.demo.words import ATTRIBUTES, FIRST_NAMES, LAST_NAMES, PLACES, QUALITIES, THINGS, VERBS

SEED = 20240301
ROWS = 8
WORDS = 2**17  # of a text, and as many tokens at least
FACT_AT = 2  # sentences before the fact: it stays where a prompt loses all but a few hundred tokens
SENTENCE = "The {} {} {} near the {}."
N_SENTENCES = WORDS // len(SENTENCE.split()) + 1


def long_text_rows() -> list[dict[str, Any]]:
    """Rows in LongBench's format, with `answer_span`: [start, end) characters of the answer in the context."""
    dice = Dice(SEED, torch.arange(ROWS))

    def words(purpose: str, pool: tuple[str, ...], n: int) -> list[list[str]]:
        return [[pool[index] for index in row] for row in dice.below(purpose, len(pool), n).tolist()]

    pools = {"q": QUALITIES, "t": THINGS, "v": VERBS, "p": PLACES}
    filler = [words(name, pool, N_SENTENCES) for name, pool in pools.items()]
    people = words("first name", FIRST_NAMES, 1), words("last name", LAST_NAMES, 1), words("what", ATTRIBUTES, 1)
    values = words("quality", QUALITIES, 1), words("thing", THINGS, 1)
    rows = []
    for number in range(ROWS):
        sentences = [SENTENCE.format(*some) for some in zip(*(column[number] for column in filler), strict=True)]
        first, last, attribute = (column[number][0] for column in people)
        answer = " ".join(column[number][0] for column in values)
        fact = f"{first} {last}'s {attribute} is {answer}."
        before = " ".join(sentences[:FACT_AT])
        context = f"{before} {fact}\n{' '.join(sentences[FACT_AT:])}"
        start = len(before) + 1 + fact.index(" is ") + len(" is ")
        rows.append(
            {
                "input": f"Question: what is {first} {last}'s {attribute}? Answer: {first} {last}'s {attribute} is",
                "context": context,
                "answers": [answer],
                "length": len(context.split()),
                "dataset": "long_text",
                "language": "en",
                "all_classes": None,
                "_id": f"long-{number}",
                "answer_span": [start, start + len(answer)],
            }
        )
    return rows
