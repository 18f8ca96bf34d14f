"""What a sweep over the built-in data set found, by question family: tables and a plot.

python scripts/summarise_demo.py RESULTS_FOLDER [--output results/demo]    # RESULTS_FOLDER: the sweep's output_dir
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from benchmark_records import ROOT, Row, write_rows

from experiments.longbench_qa.data import DEMO_SETS
from experiments.longbench_qa.demo.rows import EVALUATED
from experiments.longbench_qa.score_plot import Point, draw_scores, save_svg

FIRST_TOKEN = "after_prompt, first token compressed"
COMPRESS = ("after_prompt", FIRST_TOKEN, "after_context")
METHODS = (
    "full",
    "random",
    "streaming_llm",
    "key_norm",
    "key_diff",
    "h2o",
    "cab",
    "tova",
    "expected_attention",
    "snapkv",
    "pyramidkv",
    "adakv",
)
ALL = "all"
VARIED = ("method", "compress", "first_token")  # beside the budget, which is the method's
CELL = ("compress", "method", "budget")
MEANS = ("n", "score", "standard_error", "answer_kept", "kept_tokens", "cache_bytes")
COLUMNS = (*CELL, "family", *MEANS)
HEAD_COLUMNS = (*CELL, "layer", "head", "answer_kept")


@dataclass(frozen=True)
class DemoCell:
    """A cell as its folder records it; `method` is the folder's name, with the options that differ from the default."""

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]

    @property
    def compress(self) -> str:
        """One of COMPRESS. After the context every token comes from the compressed cache, whatever `first_token` is."""
        at_once = self.config["compress"] == "after_prompt" and self.config["first_token"] == "compressed"
        return FIRST_TOKEN if at_once else self.config["compress"]

    @property
    def method(self) -> str:
        return self.folder.parts[-3]

    @property
    def budget(self) -> str:
        return self.metrics["budget"]

    @property
    def names(self) -> Row:
        return {"compress": self.compress, "method": self.method, "budget": self.budget}

    def order(self) -> tuple[Any, ...]:
        method = METHODS.index(self.method) if self.method in METHODS else len(METHODS)
        budget = float("inf") if self.budget == "full" else float(self.budget)
        return COMPRESS.index(self.compress), method, self.method, budget

    def of_family(self, family: str) -> list[dict[str, Any]]:
        return [sample for sample in self.samples if family in (ALL, family_of(sample))]


def family_of(sample: dict[str, Any]) -> str:
    """`one_fact_early` of `one_fact_early-1024-003`."""
    return sample["id"].rsplit("-", 2)[0]


def read_cells(results: Path) -> list[DemoCell]:
    """The demo cells under a run's output_dir, in the tables' order.

    Raises ValueError, with the cell's folder, for one that is incomplete, has failed samples, or differs from the first
    in more than method, budget, compress and first_token.
    """
    cells = []
    for file in sorted(results.glob("*/*/*/*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["dataset"]["name"] in DEMO_SETS:
            cells.append(_read_cell(file.parent, config))
    if not cells:
        raise ValueError(f"{results} holds no demo cells: give the output_dir of a run")
    first, fixed = cells[0], {key: value for key, value in cells[0].config.items() if key not in VARIED}
    ids = {sample["id"] for sample in first.samples}
    for cell in cells:
        different = sorted(key for key, value in fixed.items() if cell.config.get(key) != value)
        if different:
            raise ValueError(f"{cell.folder} has another {', '.join(different)} than {first.folder}")
        if {sample["id"] for sample in cell.samples} != ids:
            raise ValueError(f"{cell.folder} has other samples than {first.folder}")
    return sorted(cells, key=DemoCell.order)


def _read_cell(folder: Path, config: dict[str, Any]) -> DemoCell:
    predictions, metrics = folder / "predictions.jsonl", folder / "metrics.json"
    if not (predictions.exists() and metrics.exists()):
        raise ValueError(f"{folder} is incomplete: run its command again")
    samples = [json.loads(line) for line in predictions.read_text(encoding="utf-8").split("\n") if line]
    failed = sum(sample["error"] is not None for sample in samples)
    if failed:
        raise ValueError(f"{folder} has {failed} failed samples: delete their lines and run its command again")
    cell = DemoCell(folder, config, json.loads(metrics.read_text(encoding="utf-8")), samples)
    if cell.metrics["status"] != "complete":
        raise ValueError(f"{folder} is incomplete: run its command again")
    return cell


def families_in(cells: Sequence[DemoCell]) -> list[str]:
    """In their order, `all` last; all cells have the same samples."""
    found = {family_of(sample) for sample in cells[0].samples}
    known = [family for family in EVALUATED if family in found]
    return [*known, *sorted(found - set(EVALUATED)), ALL]


def result_rows(cells: Sequence[DemoCell]) -> list[Row]:
    """A row a cell and family; scores, kept tokens, answer kept and cache bytes are means over samples."""
    rows = []
    for cell in cells:
        for family in families_in(cells):
            rows.append(cell.names | {"family": family} | means(cell.of_family(family)))
    return rows


def means(samples: Sequence[dict[str, Any]]) -> Row:
    """The columns `MEANS` of these samples."""
    point = point_of(samples)
    return {
        "n": str(len(samples)),
        "score": f"{point.score:.2f}",
        "standard_error": "" if point.error is None else f"{point.error:.2f}",
        "answer_kept": _mean((sample["answer_kept"] for sample in samples), 4),
        "kept_tokens": _mean((sample["kept_tokens"] for sample in samples), 1),
        "cache_bytes": _mean((sample["cache_bytes"] for sample in samples), 0),
    }


def head_rows(cells: Sequence[DemoCell]) -> list[Row]:
    """A row a cell, layer and KV head: the share of the answer's tokens that survived there, mean over samples."""
    rows = []
    for cell in cells:
        shares = [sample["answer_kept_heads"] for sample in cell.samples if sample["answer_kept_heads"] is not None]
        for layer, heads in enumerate(shares[0] if shares else []):
            for head in range(len(heads)):
                mean = _mean((share[layer][head] for share in shares), 4)
                rows.append(cell.names | {"layer": str(layer), "head": str(head), "answer_kept": mean})
    return rows


def _mean(values: Iterable[float | None], digits: int) -> str:
    """Of those that there are: a sample whose answer stands nowhere in the context has no share that was kept."""
    found = [value for value in values if value is not None]
    return f"{statistics.fmean(found):.{digits}f}" if found else ""


def point_of(samples: Sequence[dict[str, Any]]) -> Point:
    """Their mean score with its standard error at their mean budget."""
    score, error = mean_and_error([sample["score"] for sample in samples])
    return Point(statistics.fmean(sample["budget_tokens"] for sample in samples), score, error)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean with its standard error, None of one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def plot(cells: Sequence[DemoCell], path: Path) -> None:
    """Score against budget: a row of panels for each `compress`, a column for each family."""
    from matplotlib.figure import Figure

    families = families_in(cells)
    rows = [compress for compress in COMPRESS if any(cell.compress == compress for cell in cells)]
    methods = list(dict.fromkeys(cell.method for cell in cells if cell.method != "full"))
    figure = Figure(figsize=(1.9 * len(families), 2.5 * len(rows) + 1.2), layout="constrained")
    panels = figure.subplots(len(rows), len(families), sharex=True, sharey=True, squeeze=False)
    for compress, row_panels in zip(rows, panels, strict=True):
        row_panels[0].set_ylabel(compress.replace(", ", "\n") + "\nscore (0 to 100)")
        for family, axes in zip(families, row_panels, strict=True):
            of_row = [cell for cell in cells if cell.compress == compress]
            # All methods in every row, so that each has one colour; an empty line draws nothing.
            lines = {
                method: [point_of(c.of_family(family)) for c in of_row if c.method == method] for method in methods
            }
            full = [point_of(cell.of_family(family)) for cell in of_row if cell.method == "full"]
            draw_scores(axes, lines, full[0] if full else None)
            if compress == rows[0]:
                axes.set_title(family, fontsize=10)
            axes.tick_params(axis="x", labelrotation=90)
    panels[0, 0].set_ylim(-4, 104)
    figure.supxlabel("budget (tokens per layer and KV head)", fontsize=10)
    legends = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels[:, 0]]
    handles = {label: handle for legend in legends for handle, label in legend}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 6))
    save_svg(figure, path)


def write_environment(cells: Sequence[DemoCell], path: Path) -> None:
    """What all cells were made with, each thing once: model and device, data, prompt; versions, GPU, commit."""
    found = {
        "models": _distinct(cell.metrics["model"] for cell in cells),
        "data": _distinct(cell.metrics["data"] for cell in cells),
        "prompts": _distinct(cell.metrics["prompt"] for cell in cells),
        "environments": _distinct(one for cell in cells for one in cell.metrics["environments"]),
    }
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS_FOLDER")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "demo")
    options = parser.parse_args(arguments)
    try:
        cells = read_cells(options.results)
    except ValueError as error:
        parser.error(str(error))
    write_rows(options.output / "results.csv", result_rows(cells), COLUMNS)
    write_rows(options.output / "answer_kept_heads.csv", head_rows(cells), HEAD_COLUMNS)
    plot(cells, options.output / "score.svg")
    write_environment(cells, options.output / "environment.json")
    print(f"{len(cells)} cells of {len(cells[0].samples)} samples each: {options.output}")


if __name__ == "__main__":
    main()
