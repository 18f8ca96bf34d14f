import pytest
import torch

from experiments.longbench_qa.answer_kept import answer_tokens, shares_kept
from experiments.longbench_qa.encoding import encode_prompt
from experiments.longbench_qa.models import byte_tokenizer
from experiments.longbench_qa.prompts import fill_template


def found(context: str, answers: list[str], template: str = "The answer: {context} Paris? {input}") -> list[str]:
    """The texts of the runs of tokens found."""
    tokenizer = byte_tokenizer()
    encoded = encode_prompt(tokenizer, fill_template(template, context, "paris"), 1000, chat_template=False)
    runs: list[list[int]] = []
    for token in answer_tokens(encoded, answers):
        if runs and runs[-1][-1] == token - 1:
            runs[-1].append(token)
        else:
            runs.append([token])
    return [tokenizer.decode([encoded.ids[i] for i in run]) for run in runs]


@pytest.mark.parametrize(
    ("context", "answers", "expected"),
    [
        ("It was Paris. PARIS, I say.", ["paris"], ["Paris", "PARIS"]),
        ("Die Straße, die STRASSE.", ["strasse"], ["Straße", "STRASSE"]),
        ("北京 is not 东京.", ["东京", "北京"], ["北京", "东京"]),
        ("banana", ["ana"], ["anana"]),
        ("nothing here", ["Paris"], []),
        ("nothing here", ["", " "], []),
        ("{input} Paris", ["{input}"], ["{input}"]),
    ],
)
def test_all_occurrences_in_the_context_and_no_others(context: str, answers: list[str], expected: list[str]):
    assert found(context, answers) == expected


def test_a_place_that_is_given_is_the_only_one():
    tokenizer = byte_tokenizer()
    filled = fill_template("Read: {context} {input}", "Paris or Paris", "Paris?")
    encoded = encode_prompt(tokenizer, filled, 1000, chat_template=False)
    assert answer_tokens(encoded, ["Paris"], (9, 14)) == list(range(15, 20))
    cut = encode_prompt(tokenizer, filled, 20, chat_template=False)  # where it stands now is not known
    assert answer_tokens(cut, ["Paris"], (9, 14)) == answer_tokens(cut, ["Paris"])


def test_shares_kept_by_layer_and_head():
    layers = [torch.tensor([[[-1, 2, 3], [0, 1, 9]]]), torch.tensor([[[2, 3, 4, 5], [2, 7, 8, 9]]])]
    assert shares_kept([2, 3], layers) == [[1, 0], [1, 0.5]]
    assert shares_kept([], layers) is None
