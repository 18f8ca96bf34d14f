import hashlib

import pytest
import torch

from experiments.longbench_qa.demo.language import FAMILIES, HEADER, SENTENCE, Contexts, Questions, exercise
from experiments.longbench_qa.demo.words import BOS, EOS, FIRST_NAMES, LAST_NAMES, QUALITIES, THINGS, WORDS

PASSAGES, SENTENCES = 5, 8


def words(ids: torch.Tensor) -> list[str]:
    return [WORDS[i] for i in ids.tolist()]


def some(family: str, rows: int = 40, questions: int = 4, **options) -> tuple[torch.Tensor, Questions]:
    contexts = Contexts(3, torch.arange(rows), PASSAGES, SENTENCES, **options)
    return contexts.ids, contexts.ask(family, questions)


def sentences(context: torch.Tensor) -> list[list[str]]:
    """By slot."""
    passages = context[1:].view(PASSAGES, HEADER + SENTENCES * SENTENCE)
    return [words(sentence) for sentence in passages[:, HEADER:].reshape(-1, SENTENCE)]


def test_the_same_rows_everywhere():
    digest = hashlib.sha256()
    for family in FAMILIES:
        ids, questions = some(family, held_out=True)
        digest.update(" ".join(words(torch.cat([ids[7], questions.prompts[7, 0], questions.answers[7, 0]]))).encode())
        alone = Contexts(3, torch.tensor([7]), PASSAGES, SENTENCES, held_out=True)
        assert torch.equal(alone.ids[0], ids[7]) and torch.equal(alone.ask(family, 4).answers[0], questions.answers[7])
        assert not torch.equal(ids[7], ids[8])
        assert not torch.equal(Contexts(4, torch.tensor([7]), PASSAGES, SENTENCES, held_out=True).ids, alone.ids)
    assert digest.hexdigest() == "5886f12578b5f2927b40f4989e11cce48f01c7db53b223464c04e9e707b399ee"


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_answers_the_question(family: str, held_out: bool):
    ids, asked = some(family, held_out=held_out)
    for context, prompts, answers, evidence in zip(ids, asked.prompts, asked.answers, asked.evidence, strict=True):
        told = sentences(context)
        for question, answer, slots in zip(map(words, prompts), map(words, answers), evidence.tolist(), strict=True):
            assert answer[-1] == "."
            wanted = question[question.index("Answer") + 2 :]
            if family == "one_fact":
                assert told[slots[0]] == [*wanted, *answer]
            elif family == "list":
                assert told[slots[0]] == [*wanted, *answer] and len({answer[0], answer[1], answer[3]}) == 3
            elif family == "two_hop":
                first, last, s, relation, _, attribute, _ = wanted
                hop, fact = (told[slot] for slot in slots)
                assert hop[:5] == [first, last, s, relation, "is"] and fact == [*hop[5:7], s, attribute, "is", *answer]
                assert hop[:2] != hop[5:7]
            else:
                start = 1 + slots[0] // SENTENCES * (HEADER + SENTENCES * SENTENCE)
                assert words(context[start : start + HEADER]) == ["Passage", answer[0], ":"]
                assert told[slots[0]][:4] == question[6:10]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_answer_only(family: str):
    for context in some(family, held_out=True)[0]:
        told = sentences(context)
        facts = [tuple(s[:4]) for s in told if s[2] == "'s"]
        packers = [tuple(s[:2]) for s in told if s[2] == "packed"]
        values = [tuple(s[5:7]) for s in told if s[5] in QUALITIES]
        assert (
            len(set(facts)) == len(facts)
            and len(set(values)) == len(values)
            and len(set(packers)) == len(packers) >= 4
            and len(facts) > 20
        )
        assert context[0] == BOS and len(told) == PASSAGES * SENTENCES


def pairs(held_out: bool) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """People and values."""
    people, values = set(), set()
    for context in some("one_fact", rows=200, held_out=held_out)[0]:
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
    contexts = Contexts(3, wanted, PASSAGES, SENTENCES)
    free, before = contexts.ids, contexts.ask(family).evidence
    assert before[:, 0, -1].unique().numel() > 15
    contexts.move(contexts.asked(family, 1)[:, 0, -1], wanted)
    assert torch.equal(contexts.ask(family).evidence[:, 0, -1], wanted)
    assert all(sorted(map(tuple, sentences(a))) == sorted(map(tuple, sentences(b)))
               for a, b in zip(contexts.ids, free, strict=True))  # fmt: skip


def test_some_facts_differ_in_name_and_some_in_attribute_only():
    owners, attributes = set(), set()
    for told in map(sentences, some("one_fact", rows=60)[0]):
        facts = [s for s in told if s[5] in QUALITIES and s[2] == "'s"]
        owners.add(len({tuple(s[:2]) for s in facts}))
        attributes.add(len({s[3] for s in facts}))
    n_facts = len(facts)
    assert min(attributes) == 1 and max(owners) == n_facts and max(attributes) > 10 and min(owners) <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_only_answers_are_learned(family: str):
    contexts = Contexts(3, torch.arange(9), PASSAGES, SENTENCES)
    batch, questions = exercise(contexts, family, 4), contexts.ask(family, 4)
    n = contexts.ids.shape[1]
    assert torch.equal(batch.ids[:, :n], contexts.ids) and batch.places.min() >= n
    assert torch.equal(batch.wanted[..., :-1], questions.answers) and (batch.wanted[..., -1] == EOS).all()
    follows = batch.ids[:, batch.places[:, :-1] + 1]  # what stands after each place but the last
    assert torch.equal(follows, questions.answers)
    assert torch.equal(batch.ids[:, batch.asking[:, 0]], questions.prompts[..., -1])


@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_evidence_stands(family: str):
    batch = exercise(Contexts(3, torch.arange(9), PASSAGES, SENTENCES), family, 4)
    looked_at = batch.ids.gather(1, batch.evidence.flatten(1)).view_as(batch.evidence)
    if family != "passage":
        assert torch.equal(looked_at[..., -1], batch.wanted[..., :2])
    if family == "two_hop":  # the last name of the person that the relation leads to, and whom the fact is about
        last_names = batch.ids.gather(1, (batch.evidence[..., 0, 1] - 4).flatten(1)).view(9, 4)
        assert torch.equal(looked_at[..., 0], last_names[..., None].expand(-1, -1, 2))
    else:
        assert torch.equal(looked_at[..., 0], looked_at[..., 1])
    places, about = batch.about
    assert len(places) == PASSAGES * SENTENCES * 3
    told = batch.ids[:, places[::3, None] + torch.tensor([-4, -3, -1])]
    assert torch.equal(about[:, ::3, :3], told)


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
    family = given.pop("family")
    with pytest.raises(ValueError, match=message):
        Contexts(0, torch.arange(2), **given).ask(family)
