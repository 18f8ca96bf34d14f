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
from functools import cache

import torch
from torch import Tensor

from experiments.longbench_qa.demo.dice import Dice
from experiments.longbench_qa.demo.words import (
    ATTRIBUTES,
    BOS,
    EOS,
    FIRST_NAMES,
    ID,
    LAST_NAMES,
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


@dataclass
class Questions:
    """About contexts [B, C], as token ids.

    prompts [B, Q, P], each ending where its answer begins; answers [B, Q, A], closed by "."; evidence [B, Q, E]: the
    slots of the sentences that answer it, in the order of the hops.
    """

    prompts: Tensor
    answers: Tensor
    evidence: Tensor


class Contexts:
    """Contexts of `n_passages` passages of `n_sentences` sentences for the rows [B], and questions about them."""

    def __init__(self, seed: int, rows: Tensor, n_passages: int, n_sentences: int, *, held_out: bool = False) -> None:
        self.total = total = n_passages * n_sentences
        if total < 4 or n_passages > len(NUMBERS):
            raise ValueError(
                f"{n_passages} passages of {n_sentences} sentences: at least 4 sentences, at most 64 passages"
            )
        self.n_passages, self.n_sentences, self.device = n_passages, n_sentences, rows.device
        self.dice = dice = Dice(seed, rows)
        self.n_lists, self.n_relations, n_fillers = max(1, total // 10), max(1, total // 8), total // 5
        self.n_facts = n_facts = total - self.n_lists - self.n_relations - n_fillers
        n_pairs = POOL * POOL // 4 * (1 if held_out else 3)
        people = _split_pairs(dice.permutation("people", n_pairs, n_facts), held_out)
        self.people = people + _ids(f"{FIRST_NAMES[0]} {LAST_NAMES[0]}", rows.device)

        # From many people with the same one attribute to few people with 16: in some rows a name tells a fact from the
        # others, in some an attribute, in most only the two together. Nobody has an attribute twice.
        n_attributes = 2 ** dice.below("attributes", 5, 1)
        n_owners = (n_facts + n_attributes - 1) // n_attributes + 1
        code = torch.arange(n_facts * len(ATTRIBUTES), device=rows.device)
        there = (code // len(ATTRIBUTES) < n_owners) & (code % len(ATTRIBUTES) < n_attributes)
        owned = dice.permutation("facts", len(code), n_facts, there)
        some_attributes = dice.permutation("kinds of attribute", len(ATTRIBUTES), len(ATTRIBUTES))
        self.owners = owned // len(ATTRIBUTES)
        self.attributes = some_attributes.gather(1, owned % len(ATTRIBUTES)) + ID[ATTRIBUTES[0]]
        # No value stands twice in a context.
        values = _split_pairs(dice.permutation("values", n_pairs, n_facts), held_out)
        self.values = values + _ids(f"{QUALITIES[0]} {THINGS[0]}", rows.device)

        # A relation leads to somebody else, who has a fact.
        number = torch.arange(self.n_relations, device=rows.device)
        self.subjects = dice.permutation("subjects", n_facts, n_facts)[:, number % n_facts]
        kinds = number // n_facts + dice.below("kinds", len(RELATIONS), 1)
        self.kinds = kinds % len(RELATIONS) + ID[RELATIONS[0]]
        self.targets = dice.below("targets", n_facts, self.n_relations)  # facts
        for _ in range(min(n_facts, 16)):
            own = self.owners.gather(1, self.targets) == self.subjects
            self.targets = torch.where(own, (self.targets + 1) % n_facts, self.targets)

        self.packers = dice.permutation("packers", n_facts, n_facts)[:, : self.n_lists]
        steps = 1 + torch.stack([dice.below(f"goods {i}", POOL // 2 - 1, self.n_lists) for i in range(2)], -1)
        first = dice.below("goods", POOL, self.n_lists)
        goods = torch.stack([first, first + steps[..., 0], first + steps.sum(-1)], -1) % POOL
        self.goods = goods + ID[THINGS[0]]

        def some(name: str, pool: tuple[str, ...]) -> Tensor:
            return dice.below(name, len(pool), n_fillers) + ID[pool[0]]

        self.sentences = torch.cat(
            [
                self._join(self._name(self.owners), "'s", self.attributes, "is", self.values, "."),
                self._join(
                    self._name(self.subjects), "'s", self.kinds, "is",
                    self._name(self.owners.gather(1, self.targets)), ".",
                ),
                self._join(self._name(self.packers), "packed", self.goods[..., :2], "and", self.goods[..., 2], "."),
                self._join("The", some("q", QUALITIES), some("t", THINGS), some("v", VERBS), "near the",
                           some("p", PLACES), "."),
            ],
            1,
        )  # fmt: skip
        self.order = dice.permutation("order", total, total)  # the sentence in each slot
        self.labels = dice.permutation("labels", len(NUMBERS), n_passages) + ID[NUMBERS[0]]

    def move(self, sentences: Tensor, slots: Tensor) -> None:
        """Put sentences [B] into slots [B]; what stood there takes their places."""
        there, place = self.order.gather(1, slots[:, None]), self.order.argsort(1).gather(1, sentences[:, None])
        self.order = self.order.scatter(1, place, there).scatter(1, slots[:, None], sentences[:, None])

    @property
    def ids(self) -> Tensor:
        """[B, 1 + n_passages * (HEADER + n_sentences * SENTENCE)], from <bos>."""
        rows = len(self.order)
        text = self.sentences.gather(1, self.order[..., None].expand(-1, -1, SENTENCE))
        header = self._join("Passage", self.labels, ":")
        passages = torch.cat([header, text.view(rows, self.n_passages, -1)], -1).flatten(1)
        return torch.cat([torch.full_like(passages[:, :1], BOS), passages], 1)

    def start(self, slots: Tensor) -> Tensor:
        """Where in `ids` the sentences in these slots begin."""
        return 1 + HEADER + slots * SENTENCE + slots // self.n_sentences * HEADER

    def about(self) -> tuple[Tensor, Tensor]:
        """Places [S * 3] of the fifth to seventh token of each sentence in `ids`; [B, S * 3, 4]: what they are about.

        That is the first, second and fourth token of the sentence (of a fact: name and attribute), and the passage.
        """
        slot = torch.arange(self.total, device=self.device)
        start = self.start(slot)
        places = (start[:, None] + torch.arange(4, 7, device=self.device)).flatten()
        ids, labels = self.ids, self.labels[:, slot // self.n_sentences]
        told = torch.stack([ids[:, start], ids[:, start + 1], ids[:, start + 3], labels], -1)
        return places, told.repeat_interleave(3, dim=1)

    def asked(self, family: str, n: int) -> Tensor:
        """[B, n, E]: the sentences that answer n questions of a family, in the order of the hops.

        Drawn with replacement: were no question asked twice, to leave out what was answered before would be a way to
        guess.
        """
        if family not in FAMILIES:
            raise ValueError(f"family={family!r}, known are {', '.join(FAMILIES)}")
        if family == "two_hop":
            relation = self.dice.below("asked two_hop", self.n_relations, n)
            return torch.stack([relation + self.n_facts, self.targets.gather(1, relation)], -1)
        if family == "list":
            return self.dice.below("asked list", self.n_lists, n)[..., None] + self.n_facts + self.n_relations
        return self.dice.below(f"asked {family}", self.n_facts, n)[..., None]

    def ask(self, family: str, n: int = 1) -> Questions:
        """n questions of a family."""
        asked = self.asked(family, n)
        fact = asked[..., -1]
        evidence = self.order.argsort(1).gather(1, asked.flatten(1)).view_as(asked)
        if family == "list":
            packing = fact - self.n_facts - self.n_relations
            words = {"F": self._name(self.packers.gather(1, packing))}
            goods = self.goods.gather(1, packing[..., None].expand(-1, -1, 3))
            answers = self._join(goods[..., :2], "and", goods[..., 2], ".")
        else:
            words = {"F": self._name(self.owners.gather(1, fact)), "A": self.attributes.gather(1, fact)}
            answers = self._join(self.values.gather(1, fact[..., None].expand(-1, -1, 2)), ".")
        if family == "passage":
            answers = self._join(self.labels.gather(1, evidence[..., 0] // self.n_sentences), ".")
        if family == "two_hop":
            relation = asked[..., 0] - self.n_facts
            words["F"] = self._name(self.subjects.gather(1, relation))
            words["R"] = self.kinds.gather(1, relation)
        prompt = PROMPTS[family].replace("F L", "F").split()
        return Questions(self._join(*[words.get(word, word) for word in prompt]), answers, evidence)

    def _name(self, index: Tensor) -> Tensor:
        return self.people.gather(1, index[..., None].expand(-1, -1, 2))

    def _join(self, *parts: Tensor | str) -> Tensor:
        """[B, n, k] of words and of ids [B, n] or [B, n, j]."""
        rows, n = next(part.shape[:2] for part in parts if isinstance(part, Tensor))
        columns = []
        for part in parts:
            if isinstance(part, str):
                ids = _ids(part, self.device)
                columns.append(ids.expand(rows, n, -1))
            else:
                columns.append(part if part.ndim == 3 else part[..., None])
        return torch.cat(columns, -1)


@dataclass
class Exercise:
    """Contexts with questions of one family and their answers after them, to learn from.

    Attributes:
        ids: [B, N].
        places: [Q, A], in every row the same: those whose next token is to be learned.
        wanted: [B, Q, A], that token: the answer, then the end of the text.
        about: see `Contexts.about`.
        asking: [Q, 2], of each prompt the last token, and the answer's first.
        evidence: [B, Q, 2, 2], what to look at there: in the first and in the last sentence that answers.
    """

    ids: Tensor
    places: Tensor
    wanted: Tensor
    about: tuple[Tensor, Tensor]
    asking: Tensor
    evidence: Tensor


def exercise(contexts: Contexts, family: str, n: int) -> Exercise:
    """n questions of a family after each context. Only answers are learned."""
    ids, questions = contexts.ids, contexts.ask(family, n)
    pairs = torch.cat([questions.prompts, questions.answers], -1)
    n_learned = questions.answers.shape[2] + 1
    starts = torch.arange(n, device=ids.device)[:, None] * pairs.shape[2] + ids.shape[1]
    places = starts + torch.arange(pairs.shape[2] - n_learned, pairs.shape[2], device=ids.device)
    wanted = torch.cat([questions.answers, torch.full_like(pairs[..., :1], EOS)], -1)

    # Two hops: the last name that the relation leads to, then the answer. Else the answer, both times.
    step = torch.arange(2, device=ids.device)
    told = contexts.start(questions.evidence)[:, :, None, :] + (3 if family == "list" else 5) + step[:, None]
    first = told[..., 0] - step + 1 if family == "two_hop" else told[..., 0]
    evidence = torch.stack([first, told[..., -1]], -1)
    return Exercise(torch.cat([ids, pairs.flatten(1)], 1), places, wanted, contexts.about(), places[:, :2], evidence)


@cache
def _ids(words: str, device: torch.device) -> Tensor:
    """Made once: a CUDA graph cannot hold a copy from the host."""
    return torch.tensor([ID[word] for word in words.split()], device=device)


def _split_pairs(codes: Tensor, held_out: bool) -> Tensor:
    """Pairs [.., 2] of two words of a pool: those of a held-out row sum to a multiple of four, no training row's do."""
    first, rest = codes % POOL, codes // POOL
    remainder = torch.zeros_like(first) if held_out else 1 + rest % 3
    quotient = rest if held_out else rest // 3
    return torch.stack([first, (remainder - first) % 4 + 4 * quotient], -1)
