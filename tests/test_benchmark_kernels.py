"""The benchmark's own logic: rows, order, floors, plots. What needs a GPU is replaced or left out."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))  # where the scripts find each other

import benchmark_harness_prefill
import benchmark_kernels
import benchmark_records
import kernel_comparison
import plot_kernels
from benchmark_harness_prefill import check_logits, measure_prefills
from benchmark_records import COLUMNS, Row, make_row, merged, read_rows, write_rows
from kernel_checks import Inputs, Shape
from kernel_comparison import Comparison, WrongResultError
from kernel_providers import PROVIDERS, Prepared
from kernel_timing import Percentiles, Rates, floor_ms, percentiles, repetitions, visible_pairs

SMALL = Shape(96, 96, batch=2, heads=4, kv_heads=2, head_dim=16, dtype="float32")


def stamped(*rows: Row) -> list[Row]:
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def test_a_run_replaces_its_groups_and_leaves_the_others(tmp_path: Path):
    path = tmp_path / "deep" / "benchmarks.csv"
    old = [make_row(group, "ours", "time", "ms", Percentiles(1.0), SMALL, "call") for group in ("ratio", "decode")]
    write_rows(path, merged(read_rows(path), stamped(*old), {"ratio", "decode"}))
    new = [make_row("ratio", name, "time", "ms", Percentiles(2, 1, 3), SMALL, "call") for name in ("ours", "cudnn")]
    write_rows(path, merged(read_rows(path), stamped(*new), {"ratio"}))
    assert [(row["group"], row["provider"], row["p50"]) for row in read_rows(path)] == [
        ("decode", "ours", "1"),
        ("ratio", "ours", "2"),
        ("ratio", "cudnn", "2"),
    ]
    assert read_rows(path)[1]["n_keys"] == "96" and read_rows(path)[1]["p20"] == "1"
    assert [file.name for file in path.parent.iterdir()] == ["benchmarks.csv"]


def test_a_group_that_is_run_without_result_loses_its_old_rows():
    old = stamped(make_row("ratio", "ours", "time", "ms", Percentiles(1.0)))
    assert merged(old, [], {"ratio"}) == []


def test_another_kind_of_file_is_not_overwritten(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns"):
        read_rows(path)


def test_no_row_without_numbers_and_without_a_reason():
    with pytest.raises(ValueError, match="note"):
        make_row("ratio", "ours", "time", "ms", None, SMALL)


def test_commit_outside_a_checkout_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_records, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert benchmark_records.stamp(None)["commit"] == "unknown"
    assert benchmark_records.stamp("1234abc")["commit"] == "1234abc"


def test_percentiles():
    assert percentiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Percentiles(3.5, 2.0, 5.0)
    assert percentiles([7.0]) == Percentiles(7.0)
    assert Percentiles(2.0, None, 3.0).times(2) == Percentiles(4.0, None, 6.0)


@pytest.mark.parametrize(("ms", "count"), [(1e-6, 500), (4, 100), (150, 20), (300, 5), (2000, 3)])
def test_repetitions(ms: float, count: int):
    assert repetitions(ms) == count


def not_causal(inputs: Inputs) -> Prepared:
    return PROVIDERS["ours"](replace(inputs, shape=replace(inputs.shape, causal=False)))


def out_of_memory(inputs: Inputs) -> Prepared:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def not_installed(inputs: Inputs) -> Prepared:
    raise ModuleNotFoundError("No module named 'nothing'")


def test_what_cannot_be_timed_says_why(monkeypatch: pytest.MonkeyPatch):
    timed = []
    monkeypatch.setattr(kernel_comparison, "time_calls", lambda call: timed.append(call()) or Percentiles(2.0))
    monkeypatch.setattr(kernel_comparison, "peak_bytes", lambda call: 2**20)
    for provider in (not_causal, out_of_memory, not_installed):
        monkeypatch.setitem(PROVIDERS, provider.__name__, provider)
    bench = Comparison("ratio", None, device="cpu")
    larger = replace(SMALL, n_keys=128, n_queries=128)
    providers = ["not_causal", "out_of_memory", "not_installed", "ours"]
    for shape in (SMALL, larger):
        bench.compare(shape, providers, ["call"])
    bench.compare(SMALL, ["ours"], ["memory"])
    bench.add_ratio(SMALL, "ours", "not_causal", ["call"])
    bench.add_floor(SMALL)
    assert len(timed) == 2  # ours, twice
    rows = {(row["provider"], row["what"], row["n_keys"]): row for row in bench.rows}
    assert len(rows) == len(bench.rows) == 10  # no ratio to what was not timed
    assert rows["ours", "time", "96"]["p50"] == "2" and rows["ours", "peak_memory", "96"]["p50"] == "1"
    assert rows["not_causal", "time", "96"]["note"].startswith("refused: relative error of the output")
    assert rows["out_of_memory", "time", "96"]["note"] == "out of memory"
    assert rows["out_of_memory", "time", "128"]["note"] == "not tried: out of memory at 96 keys already"
    assert rows["not_installed", "time", "128"]["note"] == "not installed: No module named 'nothing'"
    assert all(row["p50"] or row["note"] for row in bench.rows)


def test_floor_by_hand():
    shape = Shape(4, 4, heads=2, kv_heads=1, head_dim=8, dtype="float16")
    assert visible_pairs(shape, 4) == 2 * (1 + 2 + 3 + 4)
    assert visible_pairs(shape, 1) == 2 * 4
    rates = Rates(flops=1e6, copied_bytes=1e9, exps=None)
    # 20 pairs of 8 dims: two products of 2 * 8 operations each, then one
    assert floor_ms(shape, rates) == pytest.approx((640 + 320) / 1e6 * 1e3)
    assert floor_ms(replace(shape, score_queries=1), rates) == pytest.approx((640 + 128) / 1e6 * 1e3)
    assert floor_ms(replace(shape, causal=False), rates) == pytest.approx((1024 + 512) / 1e6 * 1e3)
    # the forward waits for its products, the second pass for its exponentials
    assert floor_ms(shape, replace(rates, exps=20 / 400e-6)) == pytest.approx((640 + 400) / 1e6 * 1e3)
    # q and output 128 bytes each, k and v 128 together, scores 32
    assert floor_ms(shape, replace(rates, copied_bytes=1e3)) == pytest.approx(416)


def ratio_rows() -> list[Row]:
    rows = []
    for n, times in ((2048, (0.1, 0.17, 2.0)), (4096, (0.3, 0.5, 8.0)), (8192, (1.0, 1.6, None))):
        for provider, ms in zip(("cudnn", "ours", "eager"), times, strict=True):
            numbers, note = (None, "out of memory") if ms is None else (Percentiles(ms, ms, ms), "")
            rows.append(make_row("ratio", provider, "time", "ms", numbers, Shape(n, n), "call", note))
        rows.append(make_row("ratio", "floor", "time", "ms", Percentiles(times[0] * 1.4), Shape(n, n)))
    rows.append(make_row("ratio", "cudnn", "time", "ms", Percentiles(0.09), Shape(2048, 2048), "graph"))
    rows.append(make_row("ratio", "ours", "time", "ms", Percentiles(0.15), Shape(2048, 2048), "graph"))
    rows.append(make_row("memory", "ours", "peak_memory", "MiB", Percentiles(16.51), Shape(2048, 2048), "call"))
    return stamped(*rows)


def test_table_and_series_are_those_of_the_csv():
    rows = ratio_rows()
    assert plot_kernels.ratios(rows, "ours", "call") == pytest.approx({2048: 1.7, 4096: 0.5 / 0.3, 8192: 1.6})
    assert plot_kernels.ratios(rows, "floor", "call") == pytest.approx({2048: 1.4, 4096: 1.4, 8192: 1.4})
    assert plot_kernels.series(rows, "eager", "call") == {2048: 2.0, 4096: 8.0}
    table = plot_kernels.markdown_table(rows).splitlines()
    assert table[0] == "| | 2k | 4k | 8k | 32k | 128k |"
    assert "| eager, with scores: ms | 2 | 8 | out of memory | - | - |" in table
    assert "| this library, with scores: MiB | 16.5 | - | - | - | - |" in table


def test_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_rows(tmp_path / "benchmarks.csv", ratio_rows())
    drawn = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        plot_kernels.main(["--input", str(tmp_path / "benchmarks.csv"), "--output-dir", str(folder)])
        drawn.append({file.name: file.read_text() for file in folder.iterdir()})
    assert sorted(drawn[0]) == ["ratio.svg", "time.svg"]
    assert drawn[0] == drawn[1]  # the same rows, the same file
    assert "| 2k |" in capsys.readouterr().out


def test_prefills_of_a_model(monkeypatch: pytest.MonkeyPatch):
    tiny = dict(
        model_type="qwen2",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    monkeypatch.setattr(benchmark_harness_prefill, "SHAPES", {benchmark_harness_prefill.MODEL: tiny})
    monkeypatch.setattr(benchmark_harness_prefill, "BUDGET", 16)
    bench = Comparison("harness", None, device="cpu")
    measure_prefills(bench, (30, 40))
    assert [(row["provider"], row["n_keys"]) for row in bench.rows] == [
        (provider, n) for provider in ("sdpa_full", "cab_h2o", "eager_h2o") for n in ("30", "40")
    ]
    assert all(float(row["p50"]) > 0 for row in bench.rows)
    assert {row["what"] for row in bench.rows} == {"prefill_time"}  # no memory without a GPU


def test_prefills_with_other_logits_are_refused():
    right = torch.ones(1, 1, 8)
    check_logits(right * 1.05, right)
    for wrong in (right * 1.2, right * torch.nan):
        with pytest.raises(WrongResultError, match="relative error"):
            check_logits(wrong, right)
    with pytest.raises(WrongResultError, match="sdpa_full"):
        check_logits(right, None)


def test_a_group_that_breaks_keeps_its_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(bench: Comparison, sizes: Any) -> None:
        raise RuntimeError("broken")

    def works(bench: Comparison, sizes: Any) -> None:
        assert sizes(512, 2048) == [512]
        bench.add("ours", "time", "ms", Percentiles(5.0))

    monkeypatch.setattr(benchmark_kernels, "GROUPS", {"machine": fails, "ratio": fails, "decode": works})
    path = tmp_path / "benchmarks.csv"
    write_rows(path, stamped(*(make_row(name, "x", "time", "ms", Percentiles(1.0)) for name in ("decode", "ratio"))))
    assert benchmark_kernels.run(["ratio", "decode"], path, "abc", 1024) == ["machine", "ratio"]
    rows = [(row["group"], row["provider"], row["commit"]) for row in read_rows(path)]
    assert rows == [("decode", "ours", "abc"), ("ratio", "x", "")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        benchmark_kernels.main(["--only", "ratio", "--output", str(tmp_path / "benchmarks.csv")])
    assert "NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
