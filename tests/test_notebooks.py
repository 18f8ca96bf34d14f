"""The notebooks in results/: as committed they have outputs and no error, and they run on the committed results."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

RESULTS = Path(__file__).resolve().parents[1] / "results"
NOTEBOOKS = sorted(RESULTS.glob("*.ipynb"))
REFERENCE = RESULTS / "demo" / "reference.parquet"

pytestmark = pytest.mark.skipif(not REFERENCE.is_file(), reason="needs results/demo/reference.parquet")


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def errors(notebook: NotebookNode) -> list[str]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output.get("ename", output.get("text")) for output in outputs if is_error(output)]


def is_error(output: NotebookNode) -> bool:
    return output.output_type == "error" or (output.output_type == "stream" and output.name == "stderr")


def test_the_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["budget_curves", "error_analysis", "kernels", "overview"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_as_committed_it_has_outputs_and_no_error(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert errors(notebook) == []
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert str(RESULTS.parent) not in path.read_text(encoding="utf-8")  # of the machine it ran on


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_on_the_committed_results(path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("CAB_RESULTS", "CAB_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs = []
    # An error in a cell raises CellExecutionError with its traceback.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(RESULTS)}}).execute()
    assert errors(notebook) == []
    assert any(cell.outputs for cell in code_cells(notebook))
