"""`diagnostics=kept_map`: which positions of the first sample's prompt a cell's cache holds right after the cut.

The sample is run again for it, up to the cut and once for all cells that share their prefills, and not recorded again:
what it keeps is the same each time. So a cell that is complete can still get its map, and no time or memory that is
measured has a part in it.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from torch import Tensor

from experiments.longbench_qa.cell import sample_options
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.data import load_data
from experiments.longbench_qa.generation import Task
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.prompts import fill_template, load_prompt

FILE = "kept_map.npz"  # in the cell's folder
MOST_TOKEN_TEXTS = 16_384  # of a longer prompt the texts of the tokens are left out


@dataclass(frozen=True)
class KeptMap:
    """What a cell's cache holds of one prompt.

    Attributes:
        positions: int32 [layers, KV heads, kept], in order; -1 where a layer or head keeps fewer than the one that
            keeps most.
        prompt_tokens: of all the prompt.
        compressed_tokens: those that the method chose from; the rest of the prompt follows the cut and is kept in full.
        answer_tokens: indices of the prompt's tokens that are the answer's.
        token_texts: of all of the prompt's tokens; empty if there are more than `MOST_TOKEN_TEXTS`.
    """

    sample_id: str
    positions: np.ndarray
    prompt_tokens: int
    compressed_tokens: int
    answer_tokens: list[int]
    token_texts: list[str]

    def shares(self) -> np.ndarray:
        """float64 [layers, compressed tokens]: the share of the layer's KV heads that kept the token."""
        n_layers, n_heads, _ = self.positions.shape
        found = np.zeros((n_layers, self.compressed_tokens))
        for layer, heads in enumerate(self.positions):
            found[layer] = np.bincount(heads[heads >= 0], minlength=self.compressed_tokens) / n_heads
        return found

    def save(self, path: Path) -> None:
        """Write it in one step. Raises OSError."""
        scratch = path.with_suffix(".tmp")
        try:
            with scratch.open("wb") as file:
                np.savez_compressed(
                    file,
                    sample_id=np.array(self.sample_id),
                    positions=self.positions,
                    prompt_tokens=self.prompt_tokens,
                    compressed_tokens=self.compressed_tokens,
                    answer_tokens=np.array(self.answer_tokens, dtype=np.int64),
                    token_texts=np.array(json.dumps(self.token_texts)),
                )
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def load_kept_map(path: Path) -> KeptMap:
    """What `KeptMap.save` wrote. Raises ValueError, one line, for any other file."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return KeptMap(
                str(found["sample_id"]),
                found["positions"],
                int(found["prompt_tokens"]),
                int(found["compressed_tokens"]),
                found["answer_tokens"].tolist(),
                json.loads(str(found["token_texts"])),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is no kept map: {error}; remove it, and the same command makes it again") from None


def make_kept_maps(cells: Sequence[Cell], model: ModelWrapper) -> None:
    """Save the map of each of these cells, which share their prefills, that wants one and has none.

    A cell whose method evicts nothing gets none. What fails is told, and costs no more than the maps.
    """
    wanted = [cell for cell in cells if cell.diagnostics == "kept_map" and cell.method.evicts]
    wanted = [cell for cell in wanted if not (cell.folder / FILE).exists()]
    together = [wanted] if wanted and wanted[0].prefill_chunk is None else [[cell] for cell in wanted]
    for batch in together:
        try:
            for cell, found in zip(batch, _kept_maps(batch, model), strict=True):
                found.save(cell.folder / FILE)
        except Exception as error:  # a diagnosis must not cost a sweep its summary
            print(f"no kept map of {', '.join(str(cell.folder) for cell in batch)}: {error}", file=sys.stderr)


def _kept_maps(cells: Sequence[Cell], model: ModelWrapper) -> list[KeptMap]:
    one = cells[0]
    [row], _ = load_data(one.dataset.name, one.data_dir, 1, one.cache_dir)
    template, _ = load_prompt(one.dataset.name, one.prompts_file, one.prompts, one.cache_dir)
    task, positions = model.load(one.attention).kept_positions(
        fill_template(template, row.context, row.input), [cell.method for cell in cells], **sample_options(one, row)
    )
    return [_kept_map(task, of_method) for of_method in positions]


def _kept_map(task: Task, layers: Sequence[Tensor]) -> KeptMap:
    ids = task.encoded.ids
    texts = [task.tokenizer.decode([token]) for token in ids] if len(ids) <= MOST_TOKEN_TEXTS else []
    width = max(layer.shape[-1] for layer in layers)
    positions = np.full((len(layers), layers[0].shape[0], width), -1, dtype=np.int32)
    for index, layer in enumerate(layers):
        positions[index, :, width - layer.shape[-1] :] = layer.numpy()
    return KeptMap(
        task.sample_id, positions, len(ids), task.compress_at, [int(token) for token in task.answer_tokens], texts
    )
