"""What experiment=cab_ablation found: a row a cell, a plot, and tables in Markdown on the terminal.

python scripts/summarise_cab_ablation.py RESULTS_FOLDER [--output results/cab]    # RESULTS_FOLDER: its output_dir
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from benchmark_records import ROOT, Row, write_rows
from summarise_demo import CELL, COMPRESS, MEANS, DemoCell, mean_and_error, means, read_cells, write_environment

from cab_attention import CAB
from experiments.longbench_qa.score_plot import COLORS, MARKERS, save_svg

DEFAULTS = {option.name: option.default for option in fields(CAB) if option.name != "budget"}
REFERENCES = {"h2o": "--", "snapkv": ":"}  # methods beside CAB, and how their lines are drawn
DIFFERENCES = tuple(f"minus_{base}{part}" for base in ("default", "h2o") for part in ("", "_standard_error"))
COLUMNS = (*CELL, "axis", "value", *MEANS, *DIFFERENCES)


@dataclass(frozen=True)
class Axis:
    """One option of CAB that varies, the others at their defaults but for what is `fixed` at another value.

    importance_ratio follows from the other two ratios.
    """

    name: str
    option: str
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def value(self, cell: DemoCell) -> Any:
        """The option's value in a cell on this axis; None for a cell that is not on it."""
        if cell.config["method"]["name"] != CAB.name:
            return None
        options = {**DEFAULTS, **cell.config["method"]}
        others = (DEFAULTS | self.fixed).keys() - {self.option, "importance_ratio"}
        if any(options[name] != (DEFAULTS | self.fixed)[name] for name in others):
            return None
        return options[self.option]


AXES = (
    Axis("bridge share", "bridge_ratio"),
    Axis("local share", "local_ratio"),
    Axis("selector", "bridge"),
    Axis("block size", "block_size"),
    Axis("lambda", "redundancy", {"bridge": "redundancy"}),
)


def axis_and_value(cell: DemoCell) -> tuple[str, Any]:
    """Of a cell on several axes the first; ("default", ""), and ("reference", "") for another method.

    Raises ValueError for a cell that the ablation does not have.
    """
    if cell.method in REFERENCES:
        return "reference", ""
    if cell.method == CAB.name:
        return "default", ""
    for axis in AXES:
        value = axis.value(cell)
        if value is not None:
            return axis.name, value
    raise ValueError(f"{cell.folder} is not of the ablation: allowed are {', '.join(REFERENCES)} and CAB on one axis")


def ordered(cells: Sequence[DemoCell]) -> list[DemoCell]:
    """By compress, then the references, the default, and axis by axis in ascending value; else as they come."""
    axes = ["reference", "default", *(axis.name for axis in AXES)]

    def order(cell: DemoCell) -> tuple[Any, ...]:
        axis, value = axis_and_value(cell)
        return COMPRESS.index(cell.compress), axes.index(axis), value

    return sorted(cells, key=order)


def paired_difference(cell: DemoCell, base: DemoCell) -> tuple[float, float | None]:
    """Mean over the same rows of the cell's score minus the base's, with its standard error (None of one row)."""
    scores = {sample["id"]: sample["score"] for sample in base.samples}
    return mean_and_error([sample["score"] - scores[sample["id"]] for sample in cell.samples])


def result_rows(cells: Sequence[DemoCell]) -> list[Row]:
    """A row a cell. Differences are to the default CAB and to H2O at the same budget, cut at the same place.

    Raises ValueError if one of these two is missing.
    """
    found = {(cell.compress, cell.method, cell.budget): cell for cell in cells}
    rows = []
    for cell in cells:
        axis, value = axis_and_value(cell)
        row = cell.names | {"axis": axis, "value": str(value)} | means(cell.samples)
        for name, method in (("default", CAB.name), ("h2o", "h2o")):
            base = found.get((cell.compress, method, cell.budget))
            if base is None:
                raise ValueError(f"{cell.folder} has no {method} beside it at budget {cell.budget}, {cell.compress}")
            if base is not cell:
                difference, error = paired_difference(cell, base)
                row[f"minus_{name}"] = f"{difference:.2f}"
                row[f"minus_{name}_standard_error"] = "" if error is None else f"{error:.2f}"
        rows.append(row)
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table for each compress: a line a variant, its score at each budget (and its difference to the default)."""
    budgets = sorted({row["budget"] for row in rows}, key=float)
    tables = []
    for compress in dict.fromkeys(row["compress"] for row in rows):
        lines = [f"| {compress} | {' | '.join(budgets)} |", "|---" * (len(budgets) + 1) + "|"]
        of_table = [row for row in rows if row["compress"] == compress]
        for method in dict.fromkeys(row["method"] for row in of_table):
            of_line = {row["budget"]: row for row in of_table if row["method"] == method}
            first = next(iter(of_line.values()))
            name = method if first["axis"] == "reference" else f"{first['axis']} {first['value']}".strip()
            scores = [_score(of_line[budget]) if budget in of_line else "" for budget in budgets]
            lines.append(f"| {name} | {' | '.join(scores)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _score(row: Row) -> str:
    if "minus_default" not in row:
        return row["score"]
    error = row["minus_default_standard_error"]
    return f"{row['score']} ({float(row['minus_default']):+.2f}{' ± ' + error if error else ''})"


def plot(cells: Sequence[DemoCell], path: Path) -> None:
    """Score by value: a row of panels for each compress, a column for each axis, a colour for each budget."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = [compress for compress in COMPRESS if any(cell.compress == compress for cell in cells)]
    budgets = sorted({cell.budget for cell in cells}, key=float)
    figure = Figure(figsize=(2.3 * len(AXES), 3.2 * len(rows) + 0.8), layout="constrained")
    panels = figure.subplots(len(rows), len(AXES), sharey="row", squeeze=False)
    for compress, row_panels in zip(rows, panels, strict=True):
        row_panels[0].set_ylabel(f"{compress}\nscore (0 to 100)")
        for axis, axes in zip(AXES, row_panels, strict=True):
            of_row = [cell for cell in cells if cell.compress == compress]
            draw_axis(axes, axis, {budget: [cell for cell in of_row if cell.budget == budget] for budget in budgets})
            if compress == rows[0]:
                axes.set_title(f"{axis.name} ({axis.option})", fontsize=10)
    handles = [
        Line2D([], [], color=COLORS[index], marker=MARKERS[index], label=f"budget {budget}")
        for index, budget in enumerate(budgets)
    ]
    handles += [Line2D([], [], color="black", linestyle=style, label=name) for name, style in REFERENCES.items()]
    handles.append(Line2D([], [], color="lightgrey", linewidth=4, label="default"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    save_svg(figure, path)


def draw_axis(axes: Any, axis: Axis, cells: Mapping[str, Sequence[DemoCell]]) -> None:
    """One panel from {budget: cells}, with bars of one standard error and the references as horizontal lines."""
    values = sorted({axis.value(cell) for of_budget in cells.values() for cell in of_budget} - {None})
    named = isinstance(DEFAULTS[axis.option], str)
    places = {value: index if named else value for index, value in enumerate(values)}
    for index, of_budget in enumerate(cells.values()):
        on_axis = {axis.value(cell): mean_and_error(_scores(cell)) for cell in of_budget}
        shown = [value for value in values if value in on_axis]
        axes.errorbar(
            [places[value] for value in shown],
            [on_axis[value][0] for value in shown],
            yerr=[on_axis[value][1] or 0.0 for value in shown],
            color=COLORS[index],
            marker=MARKERS[index],
            markersize=4,
            linewidth=0 if named else 1.2,  # names have no order for a line to follow
            elinewidth=1.2,
        )
        for cell in of_budget:
            if cell.method in REFERENCES:
                axes.axhline(
                    mean_and_error(_scores(cell))[0],
                    color=COLORS[index],
                    linestyle=REFERENCES[cell.method],
                    linewidth=1,
                )
    if DEFAULTS[axis.option] in places:
        axes.axvline(places[DEFAULTS[axis.option]], color="lightgrey", linewidth=4, zorder=0)
    if axis.option == "block_size":
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(list(places.values()), [str(value) for value in values], rotation=0 if named else 90, fontsize=8)
    axes.margins(x=0.2 if named else 0.1)
    axes.grid(alpha=0.3)


def _scores(cell: DemoCell) -> list[float]:
    return [sample["score"] for sample in cell.samples]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS_FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "cab")
    options = parser.parse_args(arguments)
    try:
        cells = ordered(read_cells(options.results))
        rows = result_rows(cells)
    except ValueError as error:
        parser.error(str(error))
    write_rows(options.output / "results.csv", rows, COLUMNS)
    plot(cells, options.output / "score.svg")
    write_environment(cells, options.output / "environment.json")
    print(markdown(rows))
    print(f"\n{len(cells)} cells of {len(cells[0].samples)} samples each: {options.output}")


if __name__ == "__main__":
    main()
