"""The script runs on a CPU and writes a row for everything it says it measures."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

import benchmark_shared_prefill as benchmark

ARGUMENTS = ["--shape", "tiny", "--tokens", "64", "--commit", "abc"]


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(benchmark, "REPEATS", 1)
    monkeypatch.setattr(benchmark, "DECODE_REPEATS", 1)
    monkeypatch.setattr(benchmark, "SHARES", (8,))
    monkeypatch.setattr(benchmark, "free", lambda: None)  # collecting garbage takes longer than all else
    monkeypatch.setattr(benchmark, "NEW_TOKENS", 3)
    assert benchmark.main([*ARGUMENTS, "--output", str(tmp_path / "rows.csv")]) == 0
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == benchmark.COLUMNS
    assert {(row["shape"], row["tokens"], row["commit"], row["repeats"]) for row in rows} == {
        ("tiny", "64", "abc", "1")
    }
    methods = ("streaming_llm", "h2o", "snapkv", "tova", "key_diff", "cab")
    cuts = [(name, budget) for name in methods for budget in ("8",)]
    found = {part: [(row["method"], row["budget"]) for row in rows if row["part"] == part] for part in {*parts(rows)}}
    assert found["prefill"] == [("no_scores", "full"), ("all_scores", "full")]
    assert found["shared"] == [("all", "all")]
    assert found["separate"] == found["decode"] == [*cuts, ("all", "all")]
    assert len(rows) == 2 + 1 + 2 * 7
    ms = {(row["part"], row["method"], row["budget"]): float(row["ms"]) for row in rows}
    assert min(ms.values()) > 0
    for part in ("separate", "decode"):
        assert ms[part, "all", "all"] == pytest.approx(sum(ms[part, *cut] for cut in cuts), rel=1e-3)
    for row in rows:
        key = (row["part"], row["method"], row["budget"])
        assert float(row["in_prefills"]) == pytest.approx(ms[key] / ms["prefill", "all_scores", "full"], rel=1e-3)
        assert float(row["in_plain_prefills"]) == pytest.approx(ms[key] / ms["prefill", "no_scores", "full"], rel=1e-3)
        assert (row["peak_mib"] == "") == (row["part"] == "decode" or not torch.cuda.is_available())
    assert "one shared prefill with 6 cuts" in capsys.readouterr().out


def parts(rows: list[dict[str, str]]) -> list[str]:
    return [row["part"] for row in rows]


@pytest.mark.parametrize(("in_prefills", "told"), [(1.5, "holds"), (1.51, "does not hold")])
def test_the_claim_is_of_the_shared_prefill(in_prefills: float, told: str):
    rows = [
        dict(part=part, method=method, budget=budget, ms=1.0, peak_mib=2.0, in_prefills=factor, in_plain_prefills=9.0)
        for part, method, budget, factor in (
            ("prefill", "no_scores", "full", 9.0),
            ("prefill", "all_scores", "full", 1.0),
            ("shared", "all", "all", in_prefills),
            ("separate", "h2o", 8, 9.0),
            ("separate", "all", "all", 9.0),
            ("decode", "all", "all", 9.0),
        )
    ]
    assert benchmark.told(rows).splitlines()[-1] == f"at most 1.5 prefills with all scores: {told}"
    assert "with 1 cuts" in benchmark.told(rows) and "peak 2 MiB" in benchmark.told(rows)


def test_a_prompt_too_short_for_the_budgets_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmark.main(["--shape", "tiny", "--tokens", "63"])
    assert "--tokens 63: allowed is 64 or more" in capsys.readouterr().err
