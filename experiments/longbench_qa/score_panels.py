"""Score against budget in a panel for each protocol and part of the results: data sets, or the demo's families."""

from typing import TYPE_CHECKING

import pandas as pd

from experiments.longbench_qa.figure_tables import protocols, scores_by_budget, select
from experiments.longbench_qa.figures import score_lines
from experiments.longbench_qa.results import Results
from experiments.longbench_qa.score_plot import draw_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUILT_IN = "demo_qa"  # its ids are FAMILY-LENGTH-NUMBER


def parts_of(results: Results) -> dict[str, Results]:
    """{data set: its cells and samples}; of a built-in data set {family: its cells and that family's samples}."""
    parts = {}
    for dataset in dict.fromkeys(results.cells["dataset"].dropna()):
        chosen = select(results, dataset=dataset)
        if not dataset.startswith(BUILT_IN):
            parts[dataset] = chosen
            continue
        families = family_of(chosen)
        for family in dict.fromkeys(families):
            name = family if results.cells["dataset"].nunique() == 1 else f"{dataset}, {family}"
            parts[name] = Results(chosen.cells, chosen.samples[families == family])
    return parts


def family_of(results: Results) -> pd.Series:
    """The family of questions of each sample of a built-in data set: `two_hop` of `two_hop-1024-003`."""
    return results.samples["id"].str.rsplit("-", n=2).str[0]


def score_panels(results: Results) -> "Figure":
    """A column for each of `parts_of`, a row for each of `protocols`, with 95 % intervals; complete cells only.

    A method has one look in all panels. A panel without a complete cell stays empty.

    Raises ValueError if there is no cell whose data set is known, and as `scores_by_budget` does.
    """
    from matplotlib.figure import Figure

    parts, rows = parts_of(results), protocols(results)
    if not parts:
        raise ValueError("nothing to draw: there is no cell whose data set is known")
    figure = Figure(figsize=(2.1 * len(parts) + 0.6, 2.6 * len(rows) + 1), layout="constrained")
    panels = figure.subplots(len(rows), len(parts), sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels[0], parts, strict=True):
        axes.set_title(name, fontsize=9)
    for where, of_row in zip(rows, panels, strict=True):
        of_row[0].set_ylabel("\n".join([*(f"{key}={value}" for key, value in where.items()), "score (0 to 100)"]))
        for part, axes in zip(parts.values(), of_row, strict=True):
            draw_scores(axes, *score_lines(results, scores_by_budget(part, **where)[0]))
            axes.tick_params(axis="x", labelrotation=90)
    panels[0, 0].set_ylim(-4, 104)
    figure.supxlabel("budget (tokens per layer and KV head)", fontsize=10)
    found = [axes.get_legend_handles_labels() for axes in panels.flat]
    handles = {label: handle for of_axes in found for handle, label in zip(*of_axes, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 6), fontsize=8)
    return figure
