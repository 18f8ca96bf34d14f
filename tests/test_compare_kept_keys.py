"""The comparison of kept keys: its shares by hand, its truth against the definition, the script from end to end."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

import compare_kept_keys
from compare_kept_keys import NEW_TOKENS, SCORES, compare_layers, exact_scores, kept_keys, kept_share, main, verdicts

from cab_attention.kernels.reference import attention_reference

WORDS = ("miller", "river", "bridge", "lantern", "Anna", "carries", "behind", "seven", "bells", "quietly", "the", "of")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return compare_kept_keys.sharp_model(2, 64, "cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two invented rows; the first is longer than the 200 tokens that are asked for below."""
    drawn = torch.randint(len(WORDS), (60,), generator=torch.Generator().manual_seed(0))
    context = " ".join(WORDS[index] for index in drawn.tolist())
    path = tmp_path / "invented.jsonl"
    rows = [dict(input="Who carries the lantern?", context=text) for text in (context, context[:100])]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_share_by_hand():
    reference = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7]]])
    assert kept_share(reference, reference) == 1
    # three of the four of the first head, two of the second; what the other head keeps does not count
    assert kept_share(torch.tensor([[[1, 2, 3, 4], [0, 1, 6, 7]]]), reference) == 5 / 8


def test_kept_keys_by_hand():
    scores = torch.tensor([[[5.0, 1.0, 3.0, 4.0, 0.1, 0.2]]])
    assert kept_keys(scores, torch.zeros(1, 1, 6, 2), 4).tolist() == [[[0, 3, 4, 5]]]  # two heavy ones, two recent


def test_truth_is_that_of_the_definition(model: PreTrainedModel):
    q, k = (torch.randn(1, heads, 40, 64, generator=torch.Generator().manual_seed(0)) * 2 for heads in (16, 4))
    scores, sharpness = exact_scores(model.model.layers[0].self_attn, q, k)
    _, expected = attention_reference(q.double(), k.double(), k.double(), is_causal=True)
    torch.testing.assert_close(scores, expected.unflatten(1, (4, 4)).sum(2))
    assert 0 < sharpness["largest_weight"] < 1 and sharpness["logit_std"] > 1
    uniform = exact_scores(model.model.layers[0].self_attn, torch.zeros_like(q), k)[1]
    n_seen = torch.arange(1.0, 41.0, dtype=torch.float64)
    assert uniform["largest_weight"] == pytest.approx((1 / n_seen).mean().item())
    assert uniform["entropy"] == pytest.approx(n_seen.log().mean().item())


def test_wrong_scores_lower_the_share(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch):
    ids = torch.randint(256, (1, 150), generator=torch.Generator().manual_seed(0))

    def shares(attention: str, dtype: str) -> list[float]:
        rows = [row for row in compare_layers(model, ids, 32) if row.get("against") == compare_kept_keys.TRUTH]
        return [row["kept_share"] for row in rows if (row["attention"], row["dtype"]) == (attention, dtype)]

    with torch.no_grad():
        assert shares("cab", "float32") == shares("cab", "bfloat16") == [1, 1]
        right = SCORES["cab"]
        noise = torch.rand(1, 4, 150, generator=torch.Generator().manual_seed(0)) + 0.5
        monkeypatch.setitem(SCORES, "cab", lambda *inputs: right(*inputs) * noise)
        assert max(shares("cab", "float32")) < 1 and max(shares("cab", "bfloat16")) < 1


def test_the_script(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "deep" / "kept_keys.csv"
    sizes = ["--rows", "1", "--layers", "2", "--head-dim", "64", "--max-tokens", "200", "--budget", "48"]
    assert main(["--prompts", str(prompts), "--output", str(output), "--device", "cpu", "--commit", "abc", *sizes]) == 0
    printed = capsys.readouterr().out
    assert printed.count("holds: ") == 4 and printed.count("reported: ") == 1 and "FAILS" not in printed
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {part: sum(row["part"] == part for row in rows) for part in ("sharpness", "layer", "model", "generate")} == {
        "sharpness": 2,
        "layer": 2 * 5,  # cab and eager in two dtypes, and one against the other
        "model": 2 * 4,
        "generate": 1,
    }
    assert {(row["prompts"], row["prompt"], row["tokens"], row["commit"]) for row in rows} == {
        ("invented.jsonl", "0", "200", "abc")
    }
    assert all(0 <= float(row["kept_share"]) <= 1 for row in rows if row["part"] in ("layer", "model"))
    assert rows[-1]["equal_tokens"] == str(NEW_TOKENS)
    text = output.read_text() + printed
    assert not any(word in text for word in ("miller", "lantern", "Anna"))  # the data set's text stays where it is


def claims(float32: float, cab: float, eager: float, equal: int) -> list[bool | None]:
    """Verdicts on rows of one layer with these shares and equal tokens."""
    half = dict(dtype="bfloat16")
    rows = [dict(part="generate", equal_tokens=equal)]
    for part, truth in (("layer", compare_kept_keys.TRUTH), ("model", "eager float32")):
        rows.append(dict(part=part, attention="cab", dtype="float32", against="eager float32", kept_share=float32))
        rows.append(dict(part=part, attention="cab", against=truth, kept_share=cab) | half)
        rows.append(dict(part=part, attention="eager", against=truth, kept_share=eager) | half)
    return [holds for holds, _ in verdicts(rows)]


def test_verdicts():
    # float32 of a layer, of the model; bfloat16 of a layer, of the model (only reported); generation
    assert claims(0.999, 0.98, 0.98, NEW_TOKENS) == [True, True, True, None, True]
    assert claims(0.998, 0.99, 0.98, NEW_TOKENS) == [False, False, True, None, True]
    assert claims(1.0, 0.97, 0.98, NEW_TOKENS - 1) == [True, True, False, None, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--budget", "200", "--max-tokens", "200"], "budget=200: the prompt of line 1 has 200 tokens"),
        (["--budget", "150", "--rows", "2"], "the prompt of line 2 has 127 tokens"),
        (["--rows", "0"], "rows=0"),
    ],
)
def test_bad_input_is_refused(change: list[str], message: str, prompts: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["--prompts", str(prompts), "--output", str(prompts.with_suffix(".csv")), *change])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not prompts.with_suffix(".csv").exists()


def test_another_kind_of_file_is_not_overwritten(prompts: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--prompts", str(prompts), "--output", str(prompts)])
    assert "another kind of file" in capsys.readouterr().err


def test_a_line_that_is_no_row_is_named(tmp_path: Path):
    path = tmp_path / "other.jsonl"
    path.write_text('\n{"context": "only"}\n')
    with pytest.raises(ValueError, match=r"line 2: no JSON object with `context` and `input`"):
        compare_kept_keys.read_prompts(path, 1, 100, 8)
