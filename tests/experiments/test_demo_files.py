import hashlib
import json
from pathlib import Path

import pytest

from experiments.longbench_qa.data import load_rows
from experiments.longbench_qa.demo.files import FILES, demo_file
from experiments.longbench_qa.demo.rows import EVALUATED, PASSAGES, ROWS

SLICE = Path(__file__).resolve().parents[2] / "experiments" / "longbench_qa" / "demo" / "rows_1024.jsonl"


@pytest.mark.parametrize("dataset", FILES)
def test_generated_once_and_checked(tmp_path: Path, dataset: str) -> None:
    path = demo_file(dataset, str(tmp_path))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FILES[dataset][1]
    made = path.stat().st_mtime_ns
    assert demo_file(dataset, str(tmp_path)) == path and path.stat().st_mtime_ns == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rows = [json.loads(line) for line in path.open()]
    assert len(rows) == len(EVALUATED) * ROWS == len({row["context"] for row in rows})
    assert {row["dataset"] for row in rows} == {dataset}
    assert [row["_id"].rsplit("-", 2)[0] for row in rows[:12]] == [*EVALUATED, *EVALUATED]


def test_lengths_are_those_of_the_generator() -> None:
    assert {length for length, _ in FILES.values()} == set(PASSAGES)


def test_the_committed_slice_is_what_is_generated(tmp_path: Path) -> None:
    lines = demo_file("demo_qa", str(tmp_path)).read_text().splitlines(keepends=True)
    assert SLICE.read_text() == "".join(lines[: 20 * len(EVALUATED)])


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = demo_file("demo_qa_512", str(tmp_path))
    path.write_text(path.read_text().replace("amber", "ember"))
    with pytest.raises(
        ValueError, match=r"demo_qa_512-.*jsonl has sha256 .*, expected .*: remove it, it is made again"
    ):
        load_rows("demo_qa_512", None, 1, str(tmp_path))


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*/file/demo_qa/.*: Not a directory; give cache_dir=FOLDER"):
        load_rows("demo_qa", None, 1, str(tmp_path / "file"))
