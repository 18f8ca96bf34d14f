import hashlib

import pytest
import torch

from experiments.longbench_qa.demo_language import FAMILIES, HEADER, SENTENCE, Batch, draw, training_sequences
from experiments.longbench_qa.demo_words import BOS, EOS, FIRST_NAMES, LAST_NAMES, QUALITIES, THINGS, WORDS

PASSAGES, SENTENCES = 5, 8


def words(ids: torch.Tensor) -> list[str]:
    return [WORDS[i] for i in ids.tolist()]


def some(family: str, rows: int = 40, questions: int = 4, **options) -> Batch:
    return draw(3, torch.arange(rows), family, PASSAGES, SENTENCES, questions, **options)


def sentences(context: torch.Tensor) -> list[list[str]]:
    """By slot."""
    passages = context[1:].view(PASSAGES, HEADER + SENTENCES * SENTENCE)
    return [words(sentence) for sentence in passages[:, HEADER:].reshape(-1, SENTENCE)]


def test_the_same_rows_everywhere():
    digest = hashlib.sha256()
    for family in FAMILIES:
        batch = some(family, held_out=True)
        digest.update(
            " ".join(words(torch.cat([batch.contexts[7], batch.questions[7, 0], batch.answers[7, 0]]))).encode()
        )
        alone = draw(3, torch.tensor([7]), family, PASSAGES, SENTENCES, 4, held_out=True)
        assert torch.equal(alone.contexts[0], batch.contexts[7]) and torch.equal(alone.answers[0], batch.answers[7])
        assert not torch.equal(batch.contexts[7], batch.contexts[8])
        other = draw(4, torch.tensor([7]), family, PASSAGES, SENTENCES, 4, held_out=True)
        assert not torch.equal(alone.contexts, other.contexts)
    assert digest.hexdigest() == "087425f6a385d2307ad793165c628c75bee6f04c35bb64b6b5456c91adce2af0"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_answers_the_question(family: str, held_out: bool):
    batch = some(family, held_out=held_out)
    for context, questions, answers, evidence in zip(
        batch.contexts, batch.questions, batch.answers, batch.evidence, strict=True
    ):
        told = sentences(context)
        for question, answer, slots in zip(map(words, questions), map(words, answers), evidence.tolist(), strict=True):
            assert answer[-1] == "."
            asked = question[question.index("Answer") + 2 :]
            if family == "one_fact":
                assert told[slots[0]] == [*asked, *answer]
            elif family == "list":
                assert told[slots[0]] == [*asked, *answer] and len({answer[0], answer[1], answer[3]}) == 3
            elif family == "two_hop":
                first, last, s, relation, _, attribute, _ = asked
                hop, fact = (told[slot] for slot in slots)
                assert hop[:5] == [first, last, s, relation, "is"] and fact == [*hop[5:7], s, attribute, "is", *answer]
                assert hop[:2] != hop[5:7]
            else:
                start = 1 + slots[0] // SENTENCES * (HEADER + SENTENCES * SENTENCE)
                assert words(context[start : start + HEADER]) == ["Passage", answer[0], ":"]
                assert told[slots[0]][:4] == question[6:10]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer_only(family: str):
    for context in some(family, held_out=True).contexts:
        told = sentences(context)
        facts = [tuple(s[:4]) for s in told if s[2] == "'s"]
        packers = [tuple(s[:2]) for s in told if s[2] == "packed"]
        assert len(set(facts)) == len(facts) and len(set(packers)) == len(packers) >= 4 and len(facts) > 20
        assert context[0] == BOS and len(told) == PASSAGES * SENTENCES


def pairs(held_out: bool) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """People and values."""
    people, values = set(), set()
    for context in some("one_fact", rows=200, held_out=held_out).contexts:
        for s in sentences(context):
            if s[0] in FIRST_NAMES:
                people.add((s[0], s[1]))
            if s[5] in QUALITIES:
                values.add((s[5], s[6]))
            if s[4] == "is" and s[5] in FIRST_NAMES:
                people.add((s[5], s[6]))
    return people, values


def test_held_out_people_and_values_are_never_trained_on():
    (people, values), (held_people, held_values) = pairs(False), pairs(True)
    assert len(people) > 1500 and len(held_people) > 900 and len(values) > 1500 and len(held_values) > 900
    assert not people & held_people and not values & held_values
    for trained, held in ((people, held_people), (values, held_values)):  # yet every word of them is
        assert {pair[0] for pair in trained} >= {pair[0] for pair in held}
        assert {pair[1] for pair in trained} >= {pair[1] for pair in held}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_stands_where_it_is_wanted(family: str):
    wanted = torch.arange(40)
    batch = some(family, slots=wanted)
    assert torch.equal(batch.evidence[:, 0, -1], wanted)
    free = some(family)
    assert free.evidence[:, 0, -1].unique().numel() > 15
    assert all(sorted(map(tuple, sentences(a))) == sorted(map(tuple, sentences(b)))
               for a, b in zip(batch.contexts, free.contexts, strict=True))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_are_learned(family: str):
    batch = some(family)
    ids, labels = training_sequences(batch)
    assert ids.shape == labels.shape and (labels[:, : batch.contexts.shape[1]] == -100).all()
    for row, wanted, answers in zip(ids, labels, batch.answers, strict=True):
        places = (wanted != -100).nonzero()[:, 0]
        per_question = wanted[places].view(len(answers), -1)
        assert torch.equal(per_question[:, :-1], answers) and (per_question[:, -1] == EOS).all()
        follows = row[places.view(len(answers), -1)[:, :-1] + 1]  # what the label says comes next
        assert torch.equal(follows, answers)


def test_pools():
    assert len(set(WORDS)) == len(WORDS) and len(FIRST_NAMES) == len(LAST_NAMES) == len(QUALITIES) == len(THINGS) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(family="riddle"), "family='riddle', known are one_fact"),
        (dict(n_passages=65), "at most 64 passages"),
        (dict(n_sentences=0), "at least 4 sentences"),
    ],
)
def test_refused(options: dict, message: str):
    given = dict(family="list", n_passages=2, n_sentences=8) | options
    with pytest.raises(ValueError, match=message):
        draw(0, torch.arange(2), **given)
