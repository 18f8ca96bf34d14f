import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from experiments.longbench_qa import sources
from experiments.longbench_qa.data import load_data, load_rows
from experiments.longbench_qa.sources import Pinned, Provenance, cached

ROW = (
    '{"_id": "a", "input": "Who?", "context": "Ines.", "answers": ["Ines"], "length": 1, '
    '"dataset": "hotpotqa", "language": "en", "all_classes": null}\n'
)
HOTPOTQA = ROW + ROW.replace('"a"', '"b"')


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pinned:
    """A data.zip in the cache `tmp_path`, from a place that does not answer."""
    path = tmp_path / "longbench" / "data.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data/hotpotqa.jsonl", HOTPOTQA)
        file.writestr("data/lcc.jsonl", ROW.replace('"a"', "7"))
    pinned = Pinned("longbench/data.zip", "http://127.0.0.1:9/data.zip", sha256(path.read_bytes()))
    monkeypatch.setattr(sources, "OFFICIAL_DATA", pinned)
    monkeypatch.setenv("no_proxy", "*")
    return pinned


def test_rows_from_the_archive(tmp_path: Path, archive: Pinned) -> None:
    rows, provenance = load_data("hotpotqa", None, None, cache_dir=str(tmp_path))
    folder = tmp_path / "unpacked"
    folder.mkdir()
    (folder / "hotpotqa.jsonl").write_text(HOTPOTQA)
    assert rows == load_rows("hotpotqa", str(folder), None)
    assert provenance == Provenance(archive.url, load_data("hotpotqa", str(folder), None)[1].sha256)
    with pytest.raises(ValueError, match=r"data\.zip: data/lcc\.jsonl, line 1: '_id' must be of type str"):
        load_rows("lcc", None, None, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"data\.zip holds no data/trec_e\.jsonl"):
        load_rows("trec_e", None, None, cache_dir=str(tmp_path))


def test_no_archive_and_no_net(tmp_path: Path, archive: Pinned) -> None:
    with pytest.raises(ValueError, match=r"cannot download http://127\.0\.0\.1:9/data\.zip to .*data\.zip: ") as caught:
        load_rows("qasper_e", None, None, cache_dir=str(tmp_path / "empty"))
    where = "put the file there by hand, or give data_dir=FOLDER, a folder that holds qasper_e.jsonl"
    assert str(caught.value).endswith(where)
    assert "\n" not in str(caught.value)


def test_the_archive_is_pinned() -> None:
    for pinned in (sources.OFFICIAL_DATA, sources.OFFICIAL_PROMPTS):
        assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
        assert re.search("/[0-9a-f]{40}/", pinned.url)
        assert pinned.url.endswith(Path(pinned.name).name)


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = Pinned("set/rev/data.zip", "http://127.0.0.1:9/data.zip", sha256(b"zip"))
    for cache_dir, folder in ((None, ".cache/cab-attention"), ("~/mine", "mine"), (str(tmp_path / "given"), "given")):
        path = tmp_path / folder / file.name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"zip")
        assert cached(file, cache_dir, "") == path
