"""The comparison tables in LaTeX, a `table` each, for a paper that loads booktabs and graphicx."""

import re
from collections.abc import Sequence

from experiments.longbench_qa.comparison import AMONG_BEST, BEST, Comparison, Entry, Row, Table
from experiments.longbench_qa.report.words import caption, interval, score, title

HEAD = "% needs \\usepackage{booktabs} and \\usepackage{graphicx}"
MARKS = r"Bold: the best of its column; $^{\dagger}$: not distinguishable from it."
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def latex(comparison: Comparison) -> str:
    """All tables; the cells that are in none as comments at the end, with the reason."""
    parts = [HEAD, *(_table(table, number) for number, table in enumerate(comparison.tables, start=1))]
    left_out = [" ".join(f"{cell.path}: {cell.status}: {cell.reason}".split()) for cell in comparison.left_out]
    if left_out:
        parts.append("\n".join(["% cells in no table:", *(f"% {cell}" for cell in left_out)]))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text as it is."""
    return "".join(SPECIAL.get(character, character) for character in " ".join(text.split()))


def _table(table: Table, number: int) -> str:
    """Intervals stand in a line of their own below the scores; a table wider than the text is scaled down to it."""
    told = [f"{escape(title(table))}.", *map(escape, caption(table)), *([MARKS] if table.n_comparisons else [])]
    full = [line for row in table.rows if row.is_full for line in _lines(row, table.columns)]
    methods = [line for row in table.rows if not row.is_full for line in _lines(row, table.columns)]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{' '.join(told)}}}",
            rf"\label{{tab:comparison-{number}-{re.sub('[^A-Za-z0-9]+', '-', table.budget)}}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
            r"\toprule",
            _line(["method", *map(escape, table.columns)]),
            r"\midrule",
            *full,
            *([r"\midrule"] if full and methods else []),
            *methods,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def _lines(row: Row, columns: Sequence[str]) -> list[str]:
    entries = [row.entries.get(column) for column in columns]
    method = r"\textit{full cache}" if row.is_full else escape(row.method)
    between = ["" if entry is None else _interval(entry) for entry in entries]
    return [_line([method, *map(_score, entries)]), *([_line(["", *between])] if any(between) else [])]


def _line(fields: Sequence[str]) -> str:
    return " & ".join(fields) + r" \\"


def _score(entry: Entry | None) -> str:
    if entry is None:
        return "--"
    if entry.mark == BEST:
        return rf"\textbf{{{score(entry)}}}"
    return score(entry) + (r"$^{\dagger}$" if entry.mark == AMONG_BEST else "")


def _interval(entry: Entry) -> str:
    found = interval(entry)
    return rf"{{\scriptsize {found.replace(' to ', '--')}}}" if found else ""
