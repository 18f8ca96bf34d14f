import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PATH = Path(__file__).resolve().parents[1] / "scripts" / "train_demo_model.py"
spec = importlib.util.spec_from_file_location("train_demo_model", PATH)
assert spec is not None and spec.loader is not None
training = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = training
spec.loader.exec_module(training)

RECIPE = training.Recipe(steps=6, batch_tokens=256, warmup=2, width=32, layers=2, checkpoint=3)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "PASSAGES", {512: 1, 1024: 2})
    training.train(RECIPE, tmp_path / "whole", "cpu", resume=False, report=lambda line: None)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(RECIPE, tmp_path / "parts", "cpu", resume=False, report=stop)
    training.train(RECIPE, tmp_path / "parts", "cpu", resume=True, report=lambda line: None)
    whole, parts = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert whole.dtype == torch.bfloat16 and whole.config.num_key_value_heads == 4
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, parts.state_dict()[name]), name
    rows = list(csv.DictReader((tmp_path / "whole" / "log.csv").open()))
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "whole")("Ada Kern's badge").input_ids[0] == whole.config.bos_token_id
    )
    assert len((tmp_path / "whole" / "evaluation.csv").read_text().splitlines()) == 1 + 4 * 2
    assert [row["step"] for row in rows] == ["0"] and float(rows[0]["loss"]) > 1


def test_loss_falls_and_accuracy_counts_whole_answers():
    model = training.new_model(RECIPE)
    ids, labels, n_answers, n_labels = training.batch_of(0, 0, "list", 1, 4, "cpu")
    assert n_labels == n_answers * 6  # three things, "and", ".", the end
    loss, accuracy = training.loss_and_accuracy(model, ids, labels, n_answers, n_labels)
    logits = model(input_ids=ids).logits
    by_hand = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, by_hand)
    assert accuracy == 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = training.Step(model, optimizer, None)
    losses = [float(step(ids, labels, n_answers, n_labels)[0]) for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_learning_rate():
    recipe = training.Recipe(steps=100, warmup=10, decay=0.2, peak_rate=1.0)
    assert training.rate_at(0, recipe) == pytest.approx(0.1) and training.rate_at(9, recipe) == 1
    assert training.rate_at(79, recipe) == 1 and training.rate_at(90, recipe) == pytest.approx(0.5)
    assert training.rate_at(99, recipe) == pytest.approx(0.05)
