"""What the figures have in common: an empty figure with its title, a method's look, the legend."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.longbench_qa.figure_tables import FULL, methods_of, select
from experiments.longbench_qa.results import Results
from experiments.longbench_qa.score_plot import FULL_COLOR, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(results: Results, dataset: str | None, where: Mapping[str, Any]) -> "tuple[Figure, Any]":
    """An empty figure whose title says what was chosen: models, data set, protocol; and its axes."""
    from matplotlib.figure import Figure  # not above: reading tables does not need it

    cells = select(results, **chosen_by(dataset, where)).cells
    models, datasets = (sorted(set(cells[name].dropna())) for name in ("model", "dataset"))
    chosen = {key: value for key, value in where.items() if not isinstance(value, list | tuple | set)}
    protocol = [f"{key}={value}" for key, value in chosen.items() if key not in ("model", "method", "budget", "path")]
    of_datasets = datasets if len(datasets) == 1 else [f"{len(datasets)} data sets"]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    axes.set_title(", ".join([*models, *of_datasets, *protocol]), fontsize=10)
    return figure, axes


def chosen_by(dataset: str | None, where: Mapping[str, Any]) -> dict[str, Any]:
    """`where` with the data set, if one is chosen."""
    return {**where} if dataset is None else {**where, "dataset": dataset}


def style_of(results: Results, method: str) -> dict[str, str]:
    """Colour and marker, as `draw_scores` gives them by the place among all of the results' methods that evict."""
    if method == FULL:
        return {"color": FULL_COLOR, "marker": "*"}
    return style([one for one in methods_of(results) if one != FULL].index(method))


def label_of(method: str) -> str:
    """As `draw_scores` names it."""
    return "full cache" if method == FULL else method


def score_interval(row: Mapping[Any, Any]) -> tuple[float, float]:
    """`low` and `high` of a table's row; the mean itself, twice, where there is no interval."""
    return (row["mean"], row["mean"]) if pd.isna(row["low"]) else (row["low"], row["high"])


def not_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame. Raises ValueError if it has no rows."""
    if frame.empty:
        raise ValueError("nothing to draw: no complete cell is chosen, or none has the values")
    return frame


def add_legend(figure: "Figure") -> None:
    """To the right, outside the axes."""
    figure.legend(loc="outside right upper", fontsize=8)


def shares_and_scores(axes: Any) -> None:
    """Axes of a share from 0 to 1 and a score from 0 to 100, with room for the markers."""
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
