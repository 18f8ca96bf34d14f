import pytest
import torch

from experiments.longbench_qa.demo.language import Contexts
from experiments.longbench_qa.demo.rows import (
    DEPTHS,
    EVALUATED,
    PASSAGES,
    SEED,
    SENTENCES,
    evaluation_rows,
)
from experiments.longbench_qa.demo.tokenizer import demo_tokenizer
from experiments.longbench_qa.demo.words import BOS


@pytest.mark.parametrize("family", EVALUATED)
def test_spans(family: str):
    for row in evaluation_rows(family, 512, count=30):
        start, end = row["answer_span"]
        context = row["context"]
        assert context[start:end] == row["answers"][0] and len(context.splitlines()) == PASSAGES[512]
        sentences = [context[a:b] for a, b in row["evidence_spans"]]
        assert all(sentence.endswith(".") and sentence.count(".") == 1 for sentence in sentences)
        asked = row["input"].split("Answer: ")[1]
        if family in DEPTHS or family == "list":
            assert f"{asked} {row['answers'][0]}." == sentences[0]
        elif family == "two_hop":
            assert len(sentences) == 2 and asked.startswith(sentences[0].split(" is ")[0])
            assert sentences[1].startswith(sentences[0].split(" is ")[1][:-1]) and row["answers"][0] in sentences[1]
        else:
            passage = next(line for line in context.splitlines() if sentences[0] in line)
            assert passage.startswith(f"Passage {row['answers'][0]}: ")


@pytest.mark.parametrize("family", list(DEPTHS))
def test_depth(family: str):
    low, high = DEPTHS[family]
    places = [row["answer_span"][0] / len(row["context"]) for row in evaluation_rows(family, 1024)]
    assert low - 0.02 <= min(places) < low + 0.1 and high - 0.1 < max(places) <= high + 0.02


@pytest.mark.parametrize("length", PASSAGES)
def test_the_tokenizer_reads_back_what_was_drawn(length: int):
    tokenizer = demo_tokenizer()
    row = evaluation_rows("list", length, first=5, count=1)[0]
    apart = (EVALUATED.index("list") * len(PASSAGES) + list(PASSAGES).index(length)) * 2**20
    contexts = Contexts(SEED, torch.tensor([5 + apart]), PASSAGES[length], SENTENCES, held_out=True)
    ids = torch.cat([contexts.ids[0], contexts.ask("list").prompts[0, 0]]).tolist()
    assert tokenizer(f"{row['context']}\n{row['input']}").input_ids == ids and ids[0] == BOS
    assert 0.88 * length < len(ids) <= length
    assert tokenizer.decode(contexts.ask("list").answers[0, 0]) == row["answers"][0] + "."
    assert tokenizer.decode(tokenizer("Ada Kern's badge is silver fox.").input_ids, skip_special_tokens=True) == (
        "Ada Kern's badge is silver fox."
    )
    unknown = tokenizer("Ada's zebra", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(unknown) == ["Ada", "'s", "<unk>"]


def test_rows_are_apart_and_extend():
    rows = {family: evaluation_rows(family, 512, count=3) for family in EVALUATED}
    assert len({row["context"] for some in rows.values() for row in some}) == 3 * len(EVALUATED)
    assert evaluation_rows("list", 512, first=2, count=1) == rows["list"][2:]
    with pytest.raises(ValueError, match="'riddle' at 512: known are one_fact_early"):
        evaluation_rows("riddle", 512)
    with pytest.raises(ValueError, match="'list' at 513"):
        evaluation_rows("list", 513)
