"""The comparison tables of a paper: for each setting and budget a row a method, a column a data set, the average."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.longbench_qa.comparable import ComparableCell, LeftOut, budget_order, comparable_cells
from experiments.longbench_qa.dataset_average import average_difference, average_interval
from experiments.longbench_qa.results import Results
from experiments.longbench_qa.significance import (
    FLIPS,
    SIGNIFICANCE,
    Mean,
    PairedDifference,
    compare_with_best,
    holm,
    mean_interval,
    n_pairs,
)

AVERAGE = "average"
BEST = "best"
AMONG_BEST = "not distinguishable from the best"
EQUAL = 1e-9  # means of two methods that differ by rounding only


@dataclass(frozen=True)
class Entry:
    """A method's score in a column.

    Attributes:
        to_best: its scores minus the best's; None for the best, the full cache, and a method without another beside it.
        p_holm: of that difference, corrected over the table.
        mark: `BEST`, `AMONG_BEST` or "".
    """

    score: Mean
    to_best: PairedDifference | None = None
    p_holm: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """A method, or the full cache; a column without a complete cell on the column's samples is missing in `entries`."""

    method: str
    is_full: bool
    entries: Mapping[str, Entry]


@dataclass(frozen=True)
class Table:
    """One setting and budget.

    Attributes:
        n: {data set: samples}, in the columns' order. `AVERAGE` is a further column where there are several data sets.
        n_comparisons: that Holm's correction is over: each column's pairs of methods.
    """

    setting: str
    budget: str
    n: Mapping[str, int]
    rows: Sequence[Row]
    n_comparisons: int

    @property
    def columns(self) -> list[str]:
        """Data sets, and the average where there is one."""
        return [*self.n, AVERAGE] if len(self.n) > 1 else list(self.n)

    @property
    def is_resolved(self) -> bool:
        """The least p-value that the random sign flips can give stays significant when corrected."""
        return self.n_comparisons <= SIGNIFICANCE * (FLIPS + 1)


@dataclass(frozen=True)
class Comparison:
    """All cells that have a place, the tables of those that may be compared, and the cells that are in none."""

    cells: Sequence[ComparableCell]
    tables: Sequence[Table]
    left_out: Sequence[LeftOut]


def compare(results: Results, seed: int = 0) -> Comparison:
    """A table for each model and protocol (a setting) and budget: each method's scores with 95 % intervals.

    A column is a data set that a method has a cell for at this budget, whatever became of it. The average is the plain
    mean over the columns, of methods that are complete in all of them. In each column the method with the highest score
    is the best, and every other one is compared with it on the same samples (`compare_with_best`,
    `average_difference`). Holm's correction is over a whole table, the average's column included, and in each column
    over all pairs of methods, since any of them could have come out best. The full cache is a
    reference at the top of every table of its setting, without a mark, and not compared. Methods with several seeds
    have a row for each; nothing is averaged over seeds.
    """
    cells, left_out = comparable_cells(results)
    tables = []
    for setting in dict.fromkeys(cell.setting for cell in cells):
        of_setting = [cell for cell in cells if cell.setting == setting]
        full = [cell for cell in of_setting if cell.is_full]
        methods = [cell for cell in of_setting if not cell.is_full]
        for budget in sorted({cell.budget for cell in methods or full}, key=budget_order):
            at_budget = [cell for cell in methods if cell.budget == budget]
            tables.append(_table(setting, budget, at_budget, full, seed))
    return Comparison(cells, tables, left_out)


def _table(
    setting: str, budget: str, methods: Sequence[ComparableCell], full: Sequence[ComparableCell], seed: int
) -> Table:
    columns = list(dict.fromkeys(cell.column for cell in methods or full))
    scores: dict[str, dict[str, Mapping[str, float]]] = {
        method: {} for method in sorted({cell.method for cell in methods})
    }
    for cell in methods:
        if cell.scores is not None:
            scores[cell.method][cell.column] = cell.scores
    entries: dict[str, dict[str, Entry]] = {method: {} for method in scores}
    for column in columns:
        of_column = {method: found[column] for method, found in scores.items() if column in found}
        for method, standing in (compare_with_best(of_column, seed) if of_column else {}).items():
            mark = BEST if standing.to_best is None and len(of_column) > 1 else ""
            entries[method][column] = Entry(standing.score, standing.to_best, mark=mark)
    if len(columns) > 1:
        whole = {method: found for method, found in scores.items() if len(found) == len(columns)}
        for method, entry in _averages(whole, seed).items():
            entries[method][AVERAGE] = entry
    n_comparisons = _mark(entries)
    reference: dict[str, dict[str, Mapping[str, float]]] = {}
    for cell in full:
        if cell.column in columns and cell.scores is not None:
            reference.setdefault(cell.method, {})[cell.column] = cell.scores
    rows = [Row(method, True, _without_marks(found, columns, seed)) for method, found in reference.items()]
    rows += [Row(method, False, found) for method, found in entries.items()]
    n = {column: _n_samples(column, [*methods, *full]) for column in columns}
    return Table(setting, budget, n, rows, n_comparisons)


def _averages(scores: Mapping[str, Mapping[str, Mapping[str, float]]], seed: int) -> dict[str, Entry]:
    means = {method: average_interval(of_method, seed) for method, of_method in scores.items()}
    if len(means) < 2:
        return {method: Entry(mean) for method, mean in means.items()}
    best = max(means, key=lambda method: means[method].mean)
    return {
        method: Entry(mean, mark=BEST)
        if method == best
        else Entry(mean, average_difference(scores[method], scores[best], seed))
        for method, mean in means.items()
    }


def _mark(entries: Mapping[str, dict[str, Entry]]) -> int:
    """Correct all comparisons of the table and mark their entries; how many these are."""
    compared = [
        (of_method, column, entry, entry.to_best)
        for of_method in entries.values()
        for column, entry in of_method.items()
        if entry.to_best is not None
    ]
    in_columns = Counter(column for of_method in entries.values() for column in of_method)
    n_comparisons = sum(map(n_pairs, in_columns.values()))
    corrected = holm([to_best.p_value for *_, to_best in compared], n_comparisons)
    for (of_method, column, entry, to_best), p_holm in zip(compared, corrected, strict=True):
        equal = abs(to_best.difference.mean) < EQUAL
        mark = BEST if equal else AMONG_BEST if p_holm > SIGNIFICANCE else ""
        of_method[column] = Entry(entry.score, to_best, p_holm, mark)
    return n_comparisons


def _without_marks(scores: Mapping[str, Mapping[str, float]], columns: Sequence[str], seed: int) -> dict[str, Entry]:
    entries = {
        column: Entry(mean_interval([scores[column][sample] for sample in sorted(scores[column])], seed))
        for column in columns
        if column in scores
    }
    if 1 < len(columns) == len(scores):
        entries[AVERAGE] = Entry(average_interval(scores, seed))
    return entries


def _n_samples(column: str, cells: Sequence[ComparableCell]) -> int:
    """The same of every cell that has scores; 0 if none has."""
    return max((len(cell.scores) for cell in cells if cell.column == column and cell.scores is not None), default=0)
