"""What the cells of one process have in common: the model in memory, the progress bar, the summary at the end."""

from collections.abc import Mapping

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.longbench_qa.cell import Metrics, run_cells
from experiments.longbench_qa.config import Cell
from experiments.longbench_qa.interrupt import closing_on_signals
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.score_plot import plot_scores
from experiments.longbench_qa.summary_table import print_summary

_models: list[ModelWrapper] = []  # the one in memory
_finished: dict[int, tuple[Cell, Metrics]] = {}  # by number, for the summary


def groups(cells: Mapping[int, Cell]) -> list[dict[int, Cell]]:
    """Numbered cells in groups that `run_cells` takes, in the order of first appearance.

    Cells that do not share their prefill are alone (nor can they with `prefill_chunk`: a method may cut between two
    chunks), and so is one whose folder an earlier cell of its group has: it finds what that one recorded.
    """
    found: list[dict[int, Cell]] = []
    for number, cell in cells.items():
        shares = cell.share_prefill and cell.prefill_chunk is None
        for group in found:
            folders = [other.folder for other in group.values()]
            first = next(iter(group.values()))
            if shares and cell.shares_prefill_with(first) and cell.folder not in folders:
                group[number] = cell
                break
        else:
            found.append({number: cell})
    return found


def run_together(cells: Mapping[int, Cell]) -> dict[int, Metrics | Exception]:
    """Run one of the `groups` with a progress bar; the result of each cell, metrics or what went wrong."""
    first = next(iter(cells.values()))
    title = str(first.folder) if len(cells) == 1 else f"{len(cells)} cells, {first.model.name}, {first.dataset.name}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(title, visible=False)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        results = run_cells(list(cells.values()), _model_for(first), show, closing_on_signals)
    numbered = dict(zip(cells, results, strict=True))
    for number, result in numbered.items():
        if not isinstance(result, Exception):
            _finished[number] = (cells[number], result)
    return numbered


def summarise() -> None:
    """Print the table of the cells that finished, in the order of their numbers, and plot score against budget."""
    if _finished:
        cells = [_finished[number] for number in sorted(_finished)]
        print_summary(cells)
        for path in plot_scores(cells):
            print(f"score against budget: {path}")


def _model_for(cell: Cell) -> ModelWrapper:
    if not _models or _models[0].config != cell.model:
        _models.clear()  # free the last one before the next is loaded
        _models.append(ModelWrapper(cell.model))
    return _models[0]
