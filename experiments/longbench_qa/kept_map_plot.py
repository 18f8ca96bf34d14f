"""The figure of `diagnostics=kept_map`: layers x positions, a panel a method and budget."""

import re
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.kept_map import FILE, KeptMap, load_kept_map
from experiments.longbench_qa.score_plot import save_svg

MOST_COLUMNS = 512  # of a panel: a longer prompt's neighbouring tokens share one
FEWEST_ACROSS = 3  # panels side by side where there is one budget
ANSWER_COLOR = "#D55E00"


def plot_kept_maps(cells: Sequence[Cell]) -> list[Path]:
    """OUTPUT_DIR/MODEL-DATASET-kept_map.svg and .png for every model and data set whose cells have their maps."""
    figures: dict[tuple[str, str, str], dict[tuple[str, str], tuple[Cell, KeptMap]]] = {}
    for cell in cells:
        if cell.diagnostics != "kept_map" or not (cell.folder / FILE).exists():
            continue
        model, method, budget, dataset = cell.folder.relative_to(cell.output_dir).parts
        try:
            found = load_kept_map(cell.folder / FILE)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        figures.setdefault((cell.output_dir, model, dataset), {})[method, budget[1:]] = cell, found
    written = []
    for (output_dir, model, dataset), panels in figures.items():
        path = Path(output_dir) / re.sub(r"[^\w.,=-]", "_", f"{model}-{dataset}-kept_map.svg")
        figure = draw_kept_maps(f"{model}, {dataset}", {name: found for name, (_, found) in panels.items()})
        save_svg(figure, path)
        figure.savefig(path.with_suffix(".png"), dpi=150)
        written += [path, path.with_suffix(".png")]
    return written


def draw_kept_maps(title: str, panels: dict[tuple[str, str], KeptMap]) -> Any:
    """A figure with a panel for each (method, budget); of one budget three panels a row, else a row a method."""
    from matplotlib.figure import Figure  # not above: only the end of a run needs it

    budgets = list(dict.fromkeys(budget for _, budget in panels))
    budgets.sort(
        key=lambda budget: min((panel.positions >= 0).sum() for (_, own), panel in panels.items() if own == budget)
    )
    methods = list(dict.fromkeys(method for method, _ in panels))
    across = len(budgets) if len(budgets) > 1 else min(FEWEST_ACROSS, len(methods))
    places = [(method, budget) for method in methods for budget in budgets]
    down = -(-len(places) // across)
    n_layers = max(panel.positions.shape[0] for panel in panels.values())
    height = 0.7 + min(2.5, 0.05 * n_layers + 0.4)
    figure = Figure(figsize=(4 * across + 1, height * down + 0.6), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    image: Any = None
    for axes, name in zip(grid.flat, [*places, *[None] * (down * across - len(places))], strict=True):
        if name is None or name not in panels:
            axes.set_axis_off()
            continue
        axes.set_title(f"{name[0]}, budget {name[1]}", fontsize=8)
        image = _draw_panel(axes, panels[name])
    for axes in grid[-1]:
        axes.set_xlabel("position in the prompt (tokens)", fontsize=8)
    for row in grid:
        row[0].set_ylabel("layer", fontsize=8)
    samples = sorted({panel.sample_id for panel in panels.values()})
    note = (
        "triangles: the answer" if any(panel.answer_tokens for panel in panels.values()) else "no answer in the prompt"
    )
    figure.suptitle(f"{title}: kept right after the cut, sample {', '.join(samples)} ({note})", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of KV heads that kept the token", shrink=0.8)
    return figure


def _draw_panel(axes: Any, panel: KeptMap) -> Any:
    """What the method chose from is coloured; the rest of the prompt, which is kept in full, is grey."""
    shares = columns(panel.shares())
    n_layers, end = panel.positions.shape[0], panel.compressed_tokens
    extent = (0, end, n_layers - 0.5, -0.5)
    image = axes.imshow(
        shares, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest", extent=extent, rasterized=True
    )
    if end < panel.prompt_tokens:
        axes.axvspan(end, panel.prompt_tokens, color="0.85")
    axes.set_xlim(0, panel.prompt_tokens)
    for first, last in runs(panel.answer_tokens):
        axes.axvspan(first, last + 1, color=ANSWER_COLOR, alpha=0.25, linewidth=0)
        middle = (first + last + 1) / 2
        axes.plot([middle], [1.02], "v", color=ANSWER_COLOR, ms=4, clip_on=False, transform=axes.get_xaxis_transform())
    axes.tick_params(labelsize=7)
    return image


def columns(shares: np.ndarray) -> np.ndarray:
    """[layers, at most `MOST_COLUMNS`]: of tokens that share a column, the one that most heads kept."""
    n_tokens = shares.shape[1]
    if n_tokens <= MOST_COLUMNS:
        return shares
    starts = np.arange(MOST_COLUMNS) * n_tokens // MOST_COLUMNS
    return np.maximum.reduceat(shares, starts, axis=1)


def runs(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """[first, last] of each run of consecutive indices."""
    found = [
        [index for _, index in run] for _, run in groupby(enumerate(sorted(tokens)), lambda pair: pair[1] - pair[0])
    ]
    return [(run[0], run[-1]) for run in found]
