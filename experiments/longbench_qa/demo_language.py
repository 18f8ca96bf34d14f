"""The language of demo_qa: contexts of facts among distractors and questions about them, as token ids, in batches.

Everything is a function of (seed, row): random numbers are hashes of (seed, row, what for), so that a row is the same
on every machine and in every batch, and a GPU draws training data without a loop. Sentences have eight tokens:

    Ada Kern 's badge is silver fox .           a fact
    Olga Voss 's mentor is Ada Kern .           a relation: two facts answer "Olga Voss 's mentor 's badge"
    Hugo Beck packed plum arrow and harp .      a list
    The mossy bell rested near the mill .       nothing

Held-out rows combine names to people, and words to values, as no training row does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.longbench_qa.demo_words import (
    ATTRIBUTES,
    BOS,
    EOS,
    FIRST_NAMES,
    ID,
    NUMBERS,
    PLACES,
    QUALITIES,
    RELATIONS,
    THINGS,
    VERBS,
)

SENTENCE = 8  # tokens
HEADER = 3
POOL = 64  # first names, last names, qualities, things
FAMILIES = ("one_fact", "two_hop", "list", "passage")
PROMPTS = {
    "one_fact": "Question : what is F L 's A ? Answer : F L 's A is",
    "two_hop": "Question : what is F L 's R 's A ? Answer : F L 's R 's A is",
    "list": "Question : what did F L pack ? Answer : F L packed",
    "passage": "Question : which passage tells of F L 's A ? Answer : passage",
}
_GOLDEN, _MIX_1, _MIX_2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass
class Batch:
    """Rows of token ids.

    contexts [B, C]; questions [B, Q, P], each ending where its answer begins; answers [B, Q, A], closed by ".";
    evidence [B, Q, E]: the slots of the sentences that answer it, in the order of the hops.
    """

    contexts: Tensor
    questions: Tensor
    answers: Tensor
    evidence: Tensor


def draw(
    seed: int,
    rows: Tensor,
    family: str,
    n_passages: int,
    n_sentences: int,
    n_questions: int = 1,
    *,
    held_out: bool = False,
    slots: Tensor | None = None,
) -> Batch:
    """Contexts of `n_passages` passages of `n_sentences` sentences for the rows [B], and questions of one family.

    slots [B]: where the (last) sentence that answers the first question stands; default: anywhere.
    """
    total = n_passages * n_sentences
    if family not in FAMILIES:
        raise ValueError(f"family={family!r}, known are {', '.join(FAMILIES)}")
    if total < 4 or n_passages > len(NUMBERS):
        raise ValueError(f"{n_passages} passages of {n_sentences} sentences: at least 4 sentences, at most 64 passages")
    dice = _Dice(seed, rows)
    n_lists, n_relations, n_fillers = max(1, total // 10), max(1, total // 8), total // 5
    n_facts = total - n_lists - n_relations - n_fillers
    n_people = n_facts // 2 + 3

    people = _split_pairs(dice.permutation("people", POOL * POOL // 4 * (1 if held_out else 3), n_people), held_out)
    asked_about = dice.permutation("facts", n_people * len(ATTRIBUTES), n_facts)
    owners, attributes = asked_about // len(ATTRIBUTES), asked_about % len(ATTRIBUTES)
    pair = dice.below("values", POOL * POOL // 4 * (1 if held_out else 3), n_facts)
    values = _split_pairs(pair, held_out) + torch.tensor([ID[QUALITIES[0]], ID[THINGS[0]]], device=rows.device)
    names = people + torch.tensor([ID[FIRST_NAMES[0]], ID["Abel"]], device=rows.device)

    def name_of(index: Tensor) -> Tensor:
        return names.gather(1, index[..., None].expand(-1, -1, 2))

    def sentence(*parts: Tensor | str) -> Tensor:
        """[B, n, 8] of words and of ids [B, n] or [B, n, k]."""
        n = next(part.shape[1] for part in parts if isinstance(part, Tensor))
        columns = []
        for part in parts:
            if isinstance(part, str):
                ids = torch.tensor([ID[word] for word in part.split()], device=rows.device)
                columns.append(ids.expand(len(rows), n, -1))
            else:
                columns.append(part if part.ndim == 3 else part[..., None])
        return torch.cat(columns, -1)

    attribute_ids = attributes + ID[ATTRIBUTES[0]]
    facts = sentence(name_of(owners), "'s", attribute_ids, "is", values, ".")

    # A relation's first person is not the one it leads to.
    number = torch.arange(n_relations, device=rows.device).expand(len(rows), -1)
    subjects = dice.permutation("subjects", n_people, n_people)[:, number[0] % n_people]
    kinds = number // n_people % len(RELATIONS) + dice.below("kinds", len(RELATIONS), 1)
    kind_ids = kinds % len(RELATIONS) + ID[RELATIONS[0]]
    targets = dice.below("targets", n_facts, n_relations)
    for _ in range(min(n_facts, 16)):
        targets = torch.where(owners.gather(1, targets) == subjects, (targets + 1) % n_facts, targets)
    relations = sentence(name_of(subjects), "'s", kind_ids, "is", name_of(owners.gather(1, targets)), ".")

    packers = dice.permutation("packers", n_people, n_people)[:, :n_lists]
    steps = 1 + torch.stack([dice.below(f"goods {i}", POOL // 2 - 1, n_lists) for i in range(2)], -1)
    first = dice.below("goods", POOL, n_lists)
    goods = torch.stack([first, first + steps[..., 0], first + steps.sum(-1)], -1) % POOL + ID[THINGS[0]]
    lists = sentence(name_of(packers), "packed", goods[..., :2], "and", goods[..., 2], ".")

    def some(name: str, pool: tuple[str, ...]) -> Tensor:
        return dice.below(name, len(pool), n_fillers) + ID[pool[0]]

    parts = [facts, relations, lists]
    if n_fillers:
        parts.append(
            sentence(
                "The", some("q", QUALITIES), some("t", THINGS), some("v", VERBS), "near the", some("p", PLACES), "."
            )
        )
    sentences = torch.cat(parts, 1)

    # Who is asked about, and which sentences answer.
    if family in ("one_fact", "passage"):
        fact = dice.permutation("asked", n_facts, min(n_questions, n_facts))
        evidence = fact[..., None]
        words = {"F": name_of(owners.gather(1, fact)), "A": attribute_ids.gather(1, fact)}
    elif family == "two_hop":
        relation = dice.permutation("asked", n_relations, min(n_questions, n_relations))
        fact = targets.gather(1, relation)
        evidence = torch.stack([relation + n_facts, fact], -1)
        words = {"F": name_of(subjects.gather(1, relation)), "A": attribute_ids.gather(1, fact)}
        words["R"] = kind_ids.gather(1, relation)
    else:
        asked = dice.permutation("asked", n_lists, min(n_questions, n_lists))
        evidence = (asked + n_facts + n_relations)[..., None]
        words = {"F": name_of(packers.gather(1, asked))}

    order = dice.permutation("order", total, total)  # the sentence in each slot
    slot_of = order.argsort(1)
    if slots is not None:
        wanted, there = evidence[:, 0, -1:], order.gather(1, slots[:, None])
        order = order.scatter(1, slot_of.gather(1, wanted), there).scatter(1, slots[:, None], wanted)
        slot_of = order.argsort(1)
    evidence = slot_of.gather(1, evidence.flatten(1)).view_as(evidence)

    text = sentences.gather(1, order[..., None].expand(-1, -1, SENTENCE)).view(len(rows), n_passages, -1)
    labels = dice.permutation("labels", len(NUMBERS), n_passages) + ID[NUMBERS[0]]
    header = torch.tensor([ID["Passage"], 0, ID[":"]], device=rows.device).expand(len(rows), n_passages, -1).clone()
    header[..., 1] = labels
    contexts = torch.cat([header, text], -1).flatten(1)
    contexts = torch.cat([torch.full_like(contexts[:, :1], BOS), contexts], 1)

    prompt = PROMPTS[family].replace("F L", "F").split()
    questions = sentence(*[words.get(word, word) for word in prompt])
    if family == "passage":
        answers = sentence(labels.gather(1, evidence[..., 0] // n_sentences), ".")
    elif family == "list":
        answers = sentence(goods.gather(1, asked[..., None].expand(-1, -1, 3))[..., :2], "and",
                           goods.gather(1, asked[..., None].expand(-1, -1, 3))[..., 2], ".")  # fmt: skip
    else:
        answers = sentence(values.gather(1, fact[..., None].expand(-1, -1, 2)), ".")
    return Batch(contexts, questions, answers, evidence)


def training_sequences(batch: Batch) -> tuple[Tensor, Tensor]:
    """Input ids and labels [B, N]: context, then every question with its answer.

    Only answers are learned, each closed by the end of the text; labels say what follows a token, -100 elsewhere.
    """
    pairs = torch.cat([batch.questions, batch.answers], -1)
    labels = torch.full_like(pairs, -100)
    start = batch.questions.shape[-1]
    labels[..., start - 1 : -1] = batch.answers
    labels[..., -1] = EOS
    ids = torch.cat([batch.contexts, pairs.flatten(1)], 1)
    return ids, torch.cat([torch.full_like(batch.contexts, -100), labels.flatten(1)], 1)


def _split_pairs(codes: Tensor, held_out: bool) -> Tensor:
    """Pairs [.., 2] of two words of a pool: those of a held-out row sum to a multiple of four, no training row's do."""
    first, rest = codes % POOL, codes // POOL
    remainder = torch.zeros_like(first) if held_out else 1 + rest % 3
    quotient = rest if held_out else rest // 3
    return torch.stack([first, (remainder - first) % 4 + 4 * quotient], -1)


class _Dice:
    """Random numbers of rows [B]: splitmix64 of (seed, row, what for, how many-th)."""

    def __init__(self, seed: int, rows: Tensor) -> None:
        self.rows = _mix(rows.to(torch.int64) + _mix(torch.tensor(seed, device=rows.device)))

    def bits(self, purpose: str, n: int) -> Tensor:
        """[B, n], each from 0 to 2^62 - 1."""
        tag = int.from_bytes(purpose.encode()[:7], "little")
        place = torch.arange(n, device=self.rows.device)
        return _shift(_mix(_mix(self.rows + tag)[:, None] + place), 2)

    def below(self, purpose: str, bound: int, n: int) -> Tensor:
        """[B, n], uniform from 0 to bound - 1."""
        return self.bits(purpose, n) % bound

    def permutation(self, purpose: str, size: int, n: int) -> Tensor:
        """[B, n]: the first n of a random order of range(size)."""
        return self.bits(purpose, size).sort(dim=1, stable=True).indices[:, :n]


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), on int64 that wraps around."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, n: int) -> Tensor:
    """Logical, not arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)
