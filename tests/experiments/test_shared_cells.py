"""Cells that share their prefills leave the records that they leave alone."""

import json
import threading
import weakref
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cab_attention import CAB, H2O, TOVA, AdaKV, EvictingCache, Full, Random, SharedPrefill, SnapKV, StreamingLLM
from experiments.longbench_qa import generation as generation_module
from experiments.longbench_qa.cell import run_cell, run_cells
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.data import load_data
from experiments.longbench_qa.generation import Generation
from experiments.longbench_qa.in_process import groups
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.prompts import fill_template, load_prompt
from experiments.longbench_qa.records import CellRecords
from experiments.longbench_qa.schema import WandbConfig
from tests.experiments.cells import MODEL, demo_cell, recorded

METHODS = [
    Full(),
    Random(32),
    StreamingLLM(0.25, positions="compacted"),
    H2O(32),
    H2O(0.5, score_queries="every:4", evict_every=3),
    SnapKV(32, granularity="layer"),
    AdaKV(32),
    TOVA(48),
    CAB(32, block_size=4, granularity="model"),
]
NOT_ITS_OWN = ("prefill_ms", "decode_ms_per_token", "prefill_shared")  # times, and how they were taken
FEW = [H2O(32), SnapKV(32), TOVA(32)]


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL)


def cells_of(folder: Path, methods=METHODS, **changes: Any) -> list[Cell]:
    return [demo_cell(folder, method=method, **changes) for method in methods]


def results(cell: Cell) -> list[dict[str, Any]]:
    return [{key: value for key, value in sample.items() if key not in NOT_ITS_OWN} for sample in recorded(cell)]


@pytest.mark.parametrize(
    "changes",
    [{}, {"compress": "after_context"}, {"first_token": "compressed"}, {"attention": "eager"}],
    ids=["prompt", "context", "first_token", "eager"],
)
def test_records_are_those_of_separate_runs(tmp_path: Path, model: ModelWrapper, changes: dict[str, Any]):
    shared, alone = cells_of(tmp_path / "shared", **changes), cells_of(tmp_path / "alone", **changes)
    seen: list[tuple[int, int]] = []
    metrics = run_cells(shared, model, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    for cell, separate, found in zip(shared, alone, metrics, strict=True):
        assert isinstance(found, dict)
        expected = run_cell(separate, model)
        assert results(cell) == results(separate)
        assert json.loads((cell.folder / "metrics.json").read_text()) == found
        for key in expected.keys() - {"config", "mean_prefill_ms", "mean_decode_ms_per_token", "n_prefill_shared"}:
            assert found[key] == expected[key]
        assert (found["n_prefill_shared"], expected["n_prefill_shared"]) == (3, 0)
        assert found["mean_prefill_ms"] is None and expected["mean_prefill_ms"] > 0
        assert all(sample["prefill_shared"] and sample["prefill_ms"] is None for sample in recorded(cell))
    assert len({json.dumps([sample["prediction"] for sample in recorded(cell)]) for cell in shared}) > 2


@pytest.mark.parametrize(
    "options",
    [{"compress": "after_prompt"}, {"compress": "after_context"}, {"first_token": "compressed"}],
    ids=["prompt", "context", "first_token"],
)
def test_kept_positions_and_keys_are_those_of_separate_runs(model: ModelWrapper, options: dict[str, Any]):
    row = load_data("demo_qa", None, 1)[0][0]
    prompt = fill_template(load_prompt("demo_qa", None)[0], row.context, row.input)
    kept: list[list[torch.Tensor]] = []

    def remember(cache: EvictingCache) -> None:
        kept.append([t.clone() for layer in cache.layers for t in (layer.positions, layer.keys, layer.values)])

    options = {"max_new_tokens": 8, "sample_id": row.id, "on_compressed": remember, **options}
    generations = model.load().generate_each(prompt, METHODS, **options)
    together, kept = kept, []
    for method, generation, ours in zip(METHODS, generations, together, strict=True):
        assert isinstance(generation, Generation)
        alone = model.generate(prompt, method, **options)
        for key in ("text", "kept_by_layer", "answer_kept_heads", "cache_bytes"):
            assert getattr(generation, key) == getattr(alone, key)
        assert all(torch.equal(a, b) for a, b in zip(ours, kept.pop(), strict=True))


def test_one_method_is_the_plain_path(model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SharedPrefill, "__init__", lambda *args: pytest.fail("nothing to share"))
    [generation] = model.load().generate_each("some text", [H2O(4)], max_new_tokens=2)
    assert isinstance(generation, Generation)
    assert not generation.prefill_shared
    assert generation.prefill_ms is not None


def test_a_prefill_is_run_once_a_sample(tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    inner, prefills = model.load().loaded.model.forward, []

    def counting(*args, **kwargs):
        prefills.append(kwargs["input_ids"].shape[1] > 1)
        return inner(*args, **kwargs)

    monkeypatch.setattr(model.loaded.model, "forward", counting)
    run_cells(cells_of(tmp_path), model)
    assert sum(prefills) == 3


def test_cells_further_than_others_go_on_from_where_they_are(tmp_path: Path, model: ModelWrapper):
    whole, part = cells_of(tmp_path / "whole", FEW), cells_of(tmp_path / "part", FEW)
    run_cells(whole, model)
    run_cell(part[0], model)  # all three samples
    run_cell(replace(part[1], max_samples=1), model)
    before = recorded(part[0]), recorded(part[1])
    seen: list[tuple[int, int]] = []
    found = run_cells(part, model, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 3)
    assert [metrics["n_prefill_shared"] for metrics in found] == [0, 2, 2]  # type: ignore[index]
    assert [metrics["status"] for metrics in found] == ["complete"] * 3  # type: ignore[index]
    assert (recorded(part[0]), recorded(part[1])[:1]) == before
    assert [results(cell) for cell in part] == [results(cell) for cell in whole]


def failing(monkeypatch: pytest.MonkeyPatch, method: type, message: str, times: int) -> None:
    """The method's ranking raises so many times, from its second sample on."""
    inner, calls = method.priorities, []  # type: ignore[attr-defined]

    def priorities(self, cached):
        calls.append(cached.sample_ids)
        if len({*calls}) == 2 and sum(ids == calls[-1] for ids in calls) <= times:
            raise RuntimeError(message)
        return inner(self, cached)

    monkeypatch.setattr(method, "priorities", priorities)


def errors(cell: Cell) -> list[str | None]:
    return [sample["error"] for sample in recorded(cell)]


def test_a_fault_in_one_methods_ranking_is_its_own(
    tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    undisturbed, cells = cells_of(tmp_path / "undisturbed", FEW), cells_of(tmp_path / "cells", FEW)
    run_cells(undisturbed, model)
    with monkeypatch.context() as patch:
        failing(patch, SnapKV, "no ranking", times=2)  # in the shared prefill, and alone
        run_cells(cells, model)
    assert errors(cells[1]) == [None, "RuntimeError: no ranking", None]
    for index in (0, 2):
        assert results(cells[index]) == results(undisturbed[index])
        assert [sample["prefill_shared"] for sample in recorded(cells[index])] == [True, False, True]
    assert capsys.readouterr().err.count("no shared prefill for") == 1


def test_a_shared_prefill_that_fails_once_costs_no_sample(
    tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch
):
    cells = cells_of(tmp_path, FEW)
    with monkeypatch.context() as patch:
        failing(patch, SnapKV, "out of memory", times=1)
        found = run_cells(cells, model)
    assert [(metrics["n"], metrics["n_prefill_shared"]) for metrics in found] == [(3, 2)] * 3  # type: ignore[index]


def test_a_fault_in_one_methods_decode_is_its_own(tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    undisturbed, cells = cells_of(tmp_path / "undisturbed", FEW), cells_of(tmp_path / "cells", FEW)
    run_cells(undisturbed, model)
    inner, steps = model.loaded.model.forward, []

    def forward(*args, **kwargs):
        method = getattr(kwargs["past_key_values"], "method", None)
        steps.append(method)
        output = inner(*args, **kwargs)
        if isinstance(method, SnapKV) and steps.count(method) == 2:
            output.logits[..., 5] = float("nan")
        return output

    with monkeypatch.context() as patch:
        patch.setattr(model.loaded.model, "forward", forward)
        found = run_cells(cells, model)
    assert [metrics["n_failed"] for metrics in found] == [0, 1, 0]  # type: ignore[index]
    assert str(errors(cells[1])[0]).startswith("FloatingPointError: the highest logit")
    for cell, expected in zip(cells, undisturbed, strict=True):
        good = [index for index, error in enumerate(errors(cell)) if error is None]
        assert [results(cell)[index] for index in good] == [results(expected)[index] for index in good]
        assert all(sample["prefill_shared"] for sample in recorded(cell) if sample["error"] is None)


def test_a_failed_decode_holds_no_memory(model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    alive: list[int] = []
    caches: list[Any] = []

    class Counted(EvictingCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

        def check_saw(self, n_tokens):
            alive.append(sum(cache() is not None for cache in references))
            raise RuntimeError("not a cache of mine")

    monkeypatch.setattr(generation_module, "EvictingCache", Counted)
    references: list[weakref.ref] = []

    def prefill(self, *args, **kwargs):
        references.extend(weakref.ref(cache) for cache in caches)
        caches.clear()
        inner(self, *args, **kwargs)

    inner = SharedPrefill.__init__
    monkeypatch.setattr(SharedPrefill, "__init__", prefill)
    answers = model.load().generate_each("some text to keep", [H2O(4), H2O(5), H2O(6)], max_new_tokens=2)
    assert [str(answer) for answer in answers] == ["not a cache of mine"] * 3
    assert alive == [3, 2, 1]
    assert [reference() for reference in references] == [None] * 3


def test_a_cell_whose_folder_is_refused_does_not_stop_the_others(tmp_path: Path, model: ModelWrapper):
    cells = cells_of(tmp_path, [*FEW, Random(32)])
    with CellRecords(cells[0].folder, {"other": True}):
        pass
    with CellRecords(cells[2].folder, cells[2].identity()):
        found = run_cells(cells, model)
    assert "holds another cell" in str(found[0])
    assert "is being written by process" in str(found[2])
    assert [metrics["status"] for metrics in (found[1], found[3])] == ["complete"] * 2  # type: ignore[index]


def test_a_cell_that_cannot_be_written_any_more_ends_alone(
    tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch
):
    cells, inner = cells_of(tmp_path, FEW), CellRecords.add

    def add(self, sample):
        if self.folder == cells[0].folder and len(self.samples) == 1:
            raise ValueError("cannot write: no room")
        inner(self, sample)

    monkeypatch.setattr(CellRecords, "add", add)
    found = run_cells(cells, model)
    assert str(found[0]) == "cannot write: no room"
    assert [len(recorded(cell)) for cell in cells] == [1, 3, 3]


def test_a_wrong_request_is_every_cells_error(tmp_path: Path, model: ModelWrapper):
    found = run_cells(cells_of(tmp_path, FEW, max_samples=0), model)
    assert all(isinstance(error, ValueError) for error in found)
    for changes in ({"compress": "after_context"}, {"first_token": "compressed"}, {"truncate": "left"}):
        with pytest.raises(ValueError, match="method only"):
            run_cells([demo_cell(tmp_path), demo_cell(tmp_path, **changes)], model)


def test_a_model_that_cannot_load_is_the_error_of_every_cell_that_needs_it(
    tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch
):
    cells = cells_of(tmp_path, FEW)
    done = run_cell(cells[0], model)

    def load(self, **options):
        raise ValueError("no such model")

    monkeypatch.setattr(ModelWrapper, "load", load)
    found = run_cells(cells, model)
    assert found[0] == done
    assert [str(error) for error in found[1:]] == ["no such model"] * 2


def test_an_interruption_closes_every_open_cell(tmp_path: Path, model: ModelWrapper, capsys: pytest.CaptureFixture):
    cells = cells_of(tmp_path, FEW)
    run_cell(cells[0], model)  # complete: nothing of it is open
    closes: list[Callable[[], None]] = []

    @contextmanager
    def closing(close):
        closes.append(close)
        yield

    def interrupt(done: int, total: int) -> None:
        if done == 2:
            thread = threading.Thread(target=closes[0])  # from another thread, as a signal does
            thread.start()
            thread.join()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(cells, model, interrupt, closing)
    told = capsys.readouterr().err
    for cell in cells[1:]:
        assert f"interrupted: 2 of 3 samples of {cell.folder}" in told
        metrics = json.loads((cell.folder / "metrics.json").read_text())
        assert (metrics["n"], metrics["status"]) == (2, "incomplete")
    assert str(cells[0].folder) not in told
    assert all(isinstance(metrics, dict) for metrics in run_cells(cells, model))  # the locks are free


def test_every_cell_has_a_tracked_run_of_its_own(tmp_path: Path, model: ModelWrapper):
    cells = cells_of(tmp_path, FEW, wandb=WandbConfig(mode="offline"), max_samples=2)
    run_cells(cells, model)
    for cell in cells:
        assert len(list((cell.folder / "wandb").glob("offline-run-*/*.wandb"))) == 1


def test_groups(tmp_path: Path):
    def cell(**changes: Any) -> Cell:
        return demo_cell(tmp_path, **changes)

    cells = {
        3: cell(),
        4: cell(compress="after_context"),
        5: cell(method=Full()),
        6: cell(method=Full(), compress="after_context"),
        7: cell(method=Full()),  # again: it waits for the first
        8: cell(method=TOVA(8), share_prefill=False),
        9: cell(method=TOVA(9), share_prefill=False),
        10: cell(method=TOVA(8), model=replace(MODEL, max_length=200)),
        11: cell(method=TOVA(8), max_samples=2),
        12: cell(prefill_chunk=64),
        13: cell(prefill_chunk=64, method=TOVA(8)),
        14: cell(first_token="compressed"),
        15: cell(first_token="compressed", method=H2O(8, granularity="layer", evict_every=4)),
        16: cell(truncate="right"),
    }
    wanted = [[3, 5], [4, 6], [7], [8], [9], [10], [11], [12], [13], [14, 15], [16]]
    assert [list(group) for group in groups(cells)] == wanted
