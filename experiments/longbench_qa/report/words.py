"""What the tables say about themselves, the same on the page, in Markdown and in LaTeX."""

from experiments.longbench_qa.comparison import AVERAGE, Entry, Table
from experiments.longbench_qa.significance import FLIPS


def title(table: Table) -> str:
    """What the table is of."""
    return f"{table.setting}, budget {table.budget}"


def caption(table: Table) -> list[str]:
    """In sentences: what the numbers are, over how many samples, and the test; the marks are the writer's."""
    samples = ", ".join(f"{n} of {column}" if n else f"none of {column}" for column, n in table.n.items())
    told = [f"Score (0 to 100) with its 95 % bootstrap interval; samples: {samples}."]
    if AVERAGE in table.columns:
        told.append("The average is the plain mean over the data sets, for methods that are complete in all of them.")
    if any(row.is_full for row in table.rows):
        told.append("The full cache is for reference and not compared.")
    if table.n_comparisons == 1:
        told.append("Test: paired sign flips on the same samples, one comparison.")
    elif table.n_comparisons:
        told.append(
            f"Test: paired sign flips on the same samples against the best of the column, at 5 % with Holm's "
            f"correction over the {table.n_comparisons} pairs of methods in the table's columns."
        )
    if not table.is_resolved:
        told.append(
            f"These are more comparisons than {FLIPS} sign flips can resolve: no difference can be significant."
        )
    return told


def score(entry: Entry) -> str:
    """The score alone."""
    return f"{entry.score.mean:.1f}"


def interval(entry: Entry) -> str:
    """Low and high; empty for one sample, which has none."""
    low, high = entry.score.low, entry.score.high
    return "" if low is None or high is None else f"{low:.1f} to {high:.1f}"


def difference(entry: Entry) -> str:
    """How far from the best, for a reader who wants to know more; empty where there is nothing to compare."""
    if entry.to_best is None or entry.p_holm is None:
        return ""
    found = entry.to_best.difference
    spread = "" if found.low is None else f" (95 % interval {found.low:+.1f} to {found.high:+.1f})"
    return f"{found.mean:+.1f} to the best{spread}, corrected p {entry.p_holm:.2g}"
