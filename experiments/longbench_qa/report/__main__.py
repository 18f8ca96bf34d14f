"""A report of recorded results: one HTML page, and its tables in Markdown and LaTeX.

python -m experiments.longbench_qa.report FOLDER... [--output DIR]    # FOLDER: whatever `load_results` reads
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from experiments.longbench_qa.comparison import compare
from experiments.longbench_qa.report.latex import latex
from experiments.longbench_qa.report.markdown import markdown
from experiments.longbench_qa.report.page import render_page
from experiments.longbench_qa.results import load_results


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.longbench_qa.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: report/ in, or beside, the first")
    options = parser.parse_args(arguments)
    first = options.folders[0]
    folder = options.output or (first.parent if first.is_file() else first) / "report"
    try:
        results = load_results(*options.folders)
        _write(folder, {})  # what cannot be written is better known before a minute's work
        comparison = compare(results)
        files = {
            "report.html": render_page(results, comparison),
            "tables.md": markdown(comparison),
            "tables.tex": latex(comparison),
        }
        _write(folder, files)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(results.cells)} cells: {', '.join(str(folder / name) for name in files)}")


def _write(folder: Path, files: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error


if __name__ == "__main__":
    main()
