"""The map of what was kept says what the cache held right after the cut, and the figure draws that."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cab_attention import H2O, AdaKV, Full, PyramidKV, SnapKV, StreamingLLM
from experiments.longbench_qa import in_process, kept_map
from experiments.longbench_qa import kept_map_plot as plot
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.data import load_data
from experiments.longbench_qa.generation import Task
from experiments.longbench_qa.kept_map import FILE, KeptMap, load_kept_map, make_kept_maps
from experiments.longbench_qa.model_wrapper import ModelWrapper
from tests.experiments.cells import MODEL, demo_cell, recorded

METHODS = (Full(), StreamingLLM(16), H2O(32), SnapKV(0.25), AdaKV(24, window=8), PyramidKV(24, window=8))


@pytest.fixture(scope="module")
def model() -> ModelWrapper:
    return ModelWrapper(MODEL)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, model: ModelWrapper) -> None:
    monkeypatch.setattr(in_process, "_finished", {})
    monkeypatch.setattr(in_process, "_models", [model])


def cells_of(folder: Path, **changes: Any) -> list[Cell]:
    return [
        demo_cell(folder, method=method, **{"max_samples": 1, "diagnostics": "kept_map", **changes})
        for method in METHODS
    ]


def dense(positions: list[Tensor], n_tokens: int) -> np.ndarray:
    """[layers, KV heads, tokens] of a cache's positions, each [1, KV heads, kept]: 1 where the head holds the token."""
    found = np.zeros((len(positions), positions[0].shape[1], n_tokens))
    for layer, of_layer in enumerate(positions):
        for head, slots in enumerate(of_layer[0].tolist()):
            for slot in slots:
                if slot >= 0:
                    found[layer, head, slot] += 1
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_prefill": False}, {"compress": "after_context"}, {"prefill_chunk": 64}],
    ids=["shared", "alone", "context", "chunks"],
)
def test_the_map_is_what_the_cache_of_the_recorded_sample_held(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Of the caches that the recorded answers came from, looked at where the record of what is kept is made."""
    held: list[tuple[Task, list[Tensor]]] = []
    inner = Task.kept

    def kept(self, cache):
        held.append((self, [layer.positions.clone() for layer in cache.layers]))
        return inner(self, cache)

    monkeypatch.setattr(Task, "kept", kept)
    cells = cells_of(tmp_path, **changes)
    for group in in_process.groups(dict(enumerate(cells))):
        in_process.run_together(group)
    assert len(held) == len(cells)
    for cell, (task, positions) in zip(cells, held, strict=True):
        [sample] = recorded(cell)
        if isinstance(cell.method, Full):
            assert not (cell.folder / FILE).exists()
            continue
        found = load_kept_map(cell.folder / FILE)
        assert (found.sample_id, found.prompt_tokens) == (sample["id"], sample["prompt_tokens"])
        assert found.compressed_tokens == sample["compressed_tokens"]
        assert found.answer_tokens == list(task.answer_tokens) and found.answer_tokens
        assert found.token_texts == [task.tokenizer.decode([token]) for token in task.encoded.ids]
        expected = dense(positions, found.compressed_tokens)
        assert expected.max() == 1
        saved = dense([torch.tensor(layer[None]) for layer in found.positions], found.compressed_tokens)
        assert np.array_equal(saved, expected)
        assert np.array_equal(found.shares(), expected.mean(1))
        assert expected.sum((1, 2)).tolist() == [n * expected.shape[1] for n in sample["kept_by_layer"]]
    by_name = {cell.method.name: load_kept_map(cell.folder / FILE) for cell in cells[1:]}
    per_head = (by_name["adakv"].positions >= 0).sum(-1)
    per_layer = (by_name["pyramidkv"].positions >= 0).sum((-1, -2))
    assert len({*per_head[0].tolist()}) > 1 and len({*per_layer.tolist()}) > 1  # ragged, and of different budgets


def test_a_complete_cell_gets_its_map_without_a_new_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without, cells = cells_of(tmp_path, diagnostics=None), cells_of(tmp_path)
    in_process.run_together(dict(enumerate(without)))
    assert not any((cell.folder / FILE).exists() for cell in cells)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*") if path.name != "metrics.json"}
    in_process.run_together(dict(enumerate(cells)))
    assert len(before) == 12 and {path: path.read_bytes() for path in before} == before
    assert [(cell.folder / FILE).exists() for cell in cells] == [False, *[True] * 5]
    monkeypatch.setattr(ModelWrapper, "kept_positions", lambda *args, **options: pytest.fail("they are there"))
    in_process.run_together(dict(enumerate(cells)))


def test_a_map_that_cannot_be_made_is_told_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def fail(self, *args, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(ModelWrapper, "kept_positions", fail)
    results = in_process.run_together(dict(enumerate(cells_of(tmp_path))))
    assert all(isinstance(result, dict) and result["status"] == "complete" for result in results.values())
    told = capsys.readouterr().err
    assert told.startswith("no kept map of ") and told.endswith("no room\n") and "streaming_llm" in told


def test_what_is_no_map_is_refused(tmp_path: Path):
    (tmp_path / FILE).write_bytes(b"PK\x03\x04 half of a fi")
    with pytest.raises(ValueError, match=r"no kept map.*remove it") as refused:
        load_kept_map(tmp_path / FILE)
    assert "\n" not in str(refused.value)


def test_long_prompts_have_no_texts(tmp_path: Path, model: ModelWrapper, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kept_map, "MOST_TOKEN_TEXTS", 10)
    cell = demo_cell(tmp_path, diagnostics="kept_map")
    cell.folder.mkdir(parents=True)
    make_kept_maps([cell], model)
    found = load_kept_map(cell.folder / FILE)
    assert found.token_texts == [] and found.prompt_tokens > 10


def saved(cell: Cell, positions: list[list[list[int]]], n_tokens: int = 8, compressed: int | None = None) -> KeptMap:
    row = load_data("demo_qa", None, 1)[0][0]
    found = KeptMap(row.id, np.array(positions, dtype=np.int32), n_tokens, compressed or n_tokens, [2, 3, 6], [])
    cell.folder.mkdir(parents=True)
    found.save(cell.folder / FILE)
    return found


def test_the_figure_draws_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cells = [demo_cell(tmp_path, method=method, diagnostics="kept_map") for method in (H2O(2), H2O(1), SnapKV(2))]
    maps = [
        saved(cells[0], [[[0, 3], [3, 7]], [[1, 2], [1, 4]]]),
        saved(cells[1], [[[0], [0]], [[7], [6]]]),
        saved(cells[2], [[[-1, 5], [4, 5]], [[0, 1], [2, 3]]], compressed=6),
    ]
    drawn, inner = [], plot.draw_kept_maps
    monkeypatch.setattr(plot, "draw_kept_maps", lambda *given: drawn.append(inner(*given)) or drawn[-1])
    paths = plot.plot_kept_maps([*cells, replace(cells[0], diagnostics=None), demo_cell(tmp_path / "none")])
    name = "tiny,max_length=300-demo_qa-kept_map"
    assert paths == [tmp_path / f"{name}.svg", tmp_path / f"{name}.png"]
    assert all(path.stat().st_size > 1000 for path in paths)
    axes = {a.get_title(): a for a in drawn[0].axes if a.get_title()}
    assert list(axes) == ["h2o, budget 1", "h2o, budget 2", "snapkv, budget 2"]
    for panel, found in zip(axes.values(), (maps[1], maps[0], maps[2]), strict=True):
        [image] = panel.get_images()
        assert np.array_equal(image.get_array(), found.shares())
        assert image.get_extent() == [0, found.compressed_tokens, 1.5, -0.5]
        assert panel.get_xlim() == (0, 8)
        marks = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in panel.patches]
        assert marks[-2:] == [(2, 4), (6, 7)]
        assert marks[:-2] == ([(6, 8)] if found.compressed_tokens < 8 else [])
    assert maps[0].shares().tolist() == [[0.5, 0, 0, 1, 0, 0, 0, 0.5], [0, 1, 0.5, 0, 0.5, 0, 0, 0]]


def test_tokens_that_share_a_column_do_not_hide_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plot, "MOST_COLUMNS", 4)
    shares = np.zeros((1, 11))
    shares[0, [0, 4, 10]] = 0.5, 1.0, 0.25
    assert plot.columns(shares).tolist() == [[0.5, 1.0, 0.0, 0.25]]
    assert plot.columns(shares[:, :3]).tolist() == [[0.5, 0.0, 0.0]]


def test_runs_of_tokens():
    assert plot.runs([]) == []
    assert plot.runs([7, 3, 4, 5, 9]) == [(3, 5), (7, 7), (9, 9)]
