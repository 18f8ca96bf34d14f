"""The comparison tables in Markdown."""

import re
from collections.abc import Sequence

from experiments.longbench_qa.comparison import AMONG_BEST, BEST, Comparison, Entry, Row, Table
from experiments.longbench_qa.report.words import caption, interval, score, title

MARKS = "**Bold**: the best of its column; †: not distinguishable from it."


def markdown(comparison: Comparison) -> str:
    """All tables, then the cells that are in none, with the reason."""
    parts = ["# Comparison", *(_table(table) for table in comparison.tables)]
    if comparison.left_out:
        cells = [f"- {escape(cell.path)}: {escape(cell.status)}: {escape(cell.reason)}" for cell in comparison.left_out]
        parts.append("\n".join(["## Cells in no table", "", *cells]))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text as it is, in a cell of a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&])", r"\\\1", " ".join(text.split()))


def _table(table: Table) -> str:
    lines = [
        _line(["method", *map(escape, table.columns)]),
        "|---|" + "---:|" * len(table.columns),
        *(_line([_method(row), *(_entry(row.entries.get(column)) for column in table.columns)]) for row in table.rows),
    ]
    told = [*map(escape, caption(table)), *([MARKS] if table.n_comparisons else [])]
    return f"## {escape(title(table))}\n\n{' '.join(told)}\n\n" + "\n".join(lines)


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _method(row: Row) -> str:
    return "*full cache*" if row.is_full else escape(row.method)


def _entry(entry: Entry | None) -> str:
    if entry is None:
        return "-"
    shown = f"**{score(entry)}**" if entry.mark == BEST else score(entry) + ("†" if entry.mark == AMONG_BEST else "")
    between = interval(entry)
    return f"{shown} ({between})" if between else shown
