"""scripts/check_two_gpus.py: what it counts as equal, and a run on the CPU."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import is_accelerate_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

from check_two_gpus import COLUMNS, MAKES, all_heads, compare, failures, main


def positions(*heads: list[int]) -> torch.Tensor:
    return torch.tensor(heads)


def test_equal_keys_are_counted_by_layer_and_head():
    """Empty slots do not count, nor does a key that another head keeps."""
    alone = {"m": ([[positions([-1, 0, 5], [1, 2, 3])], [positions([0, 5, 6], [2, 3, 6])]], [7, 8])}
    other = {"m": ([[positions([0, 1, 5], [-1, -1, 3])], [positions([0, 5, 6], [2, 3, 6])]], [7, 9])}
    [row] = compare(alone, other, 7)
    counts = dict(prompt_keys=5, prompt_equal=3, decode_keys=6, decode_equal=6, forwards=2, equal_tokens=1)
    assert row == dict(method="m") | counts


def test_heads_of_ranks_are_put_side_by_side():
    parts = [{"m": ([[positions([0, 4])]], [7])}, {"m": ([[positions([1, 2, 3])]], [7])}]
    kept, tokens = all_heads(parts)["m"]
    assert kept[0][0].tolist() == [[-1, 0, 4], [1, 2, 3]] and tokens == [7]
    parts[1]["m"][1][0] = 8
    with pytest.raises(RuntimeError, match="m: the ranks' next tokens differ"):
        all_heads(parts)


def test_what_is_asked_for():
    """In float32 all keys with device_map, all but near-ties with tp_plan; nothing in bfloat16."""
    row = dict(method="m", prompt_keys=10_000, prompt_equal=9_995, decode_keys=1000, decode_equal=1000)
    assert failures([row | dict(dtype="float32", placement="tp_plan")]) == []
    assert failures([row | dict(dtype="bfloat16", placement="device_map", prompt_equal=0)]) == []
    assert failures([row | dict(dtype="float32", placement="device_map")]) == [
        "device_map, m, prompt: 9995 of 10000 keys"
    ]
    assert len(failures([row | dict(dtype="float32", placement="tp_plan", decode_equal=998)])) == 1


@pytest.mark.slow
@pytest.mark.skipif(not is_accelerate_available(), reason="needs accelerate")
def test_a_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--shape=tiny", "--tokens=90", "--budget=40", "--steps=2", "--dtypes", "float32"]
    assert main([*options, f"--csv={tmp_path}/kept.csv", f"--folder={tmp_path}"]) == 0
    assert "float32: as asked for" in capsys.readouterr().out
    with (tmp_path / "kept.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 2 * len(MAKES)
    assert {row["prompt_keys"] for row in rows} == {str(4 * 4 * 40)}
    assert [path.name for path in tmp_path.iterdir()] == ["kept.csv"]  # the checkpoint is gone
