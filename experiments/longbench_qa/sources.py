"""LongBench's own files: the data set's from a folder or, like the prompts, from a pinned place on the net."""

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path

from experiments.longbench_qa.download import fetch

CODE_COMMIT = "2e00731f8d0bff23dc4325161044d0ed8af94c1e"
DATA_REVISION = "5e628be450b7e67fb7ae6e201bd6d8f7056f7672"


@dataclass(frozen=True)
class Pinned:
    """A file that cannot change unnoticed. `name` is its place in the cache folder."""

    name: str
    url: str
    sha256: str


OFFICIAL_PROMPTS = Pinned(
    name=f"longbench/{CODE_COMMIT[:7]}/dataset2prompt.json",
    url=f"https://raw.githubusercontent.com/THUDM/LongBench/{CODE_COMMIT}/LongBench/config/dataset2prompt.json",
    sha256="56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
)
OFFICIAL_DATA = Pinned(  # 113,932,529 bytes; the hub's THUDM/LongBench is the same repository
    name=f"longbench/{DATA_REVISION[:7]}/data.zip",
    url=f"https://huggingface.co/datasets/zai-org/LongBench/resolve/{DATA_REVISION}/data.zip",
    sha256="cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
)


@dataclass(frozen=True)
class Provenance:
    """What a record says of an input: `builtin`, `folder`, `file` or a pinned URL, and the sha256 of what was used."""

    source: str
    sha256: str


@dataclass(frozen=True)
class Content:
    """A file's bytes; `where` names it in messages."""

    raw: bytes
    where: str
    provenance: Provenance


def place(file: Pinned, cache_dir: str | None) -> Path:
    """Where a pinned file lies in the cache (default ~/.cache/cab-attention), once it is downloaded."""
    folder = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "cab-attention"
    return folder / file.name


def cached(file: Pinned, cache_dir: str | None, alternative: str) -> Path:
    """A pinned file in the cache, downloaded if it is not there yet.

    Raises ValueError, one line, if it cannot be had; `alternative` says what else a user can do.
    """
    return fetch(file.url, place(file, cache_dir), file.sha256, alternative)


def read_data(dataset: str, data_dir: str | None, cache_dir: str | None) -> Content:
    """The jsonl file of a LongBench set: from the folder `data_dir`, or (None) out of the cached data.zip.

    The archive stays packed. Its bytes and the folder's have the same sha256 if they are the same file.
    Raises ValueError, one line, for what is missing.
    """
    name = f"{dataset}.jsonl"
    if data_dir is None:
        archive = cached(OFFICIAL_DATA, cache_dir, f"give data_dir=FOLDER, a folder that holds {name}")
        raw, where, source = _unpack(archive, f"data/{name}"), f"{archive}: data/{name}", OFFICIAL_DATA.url
    else:
        path = _find_file(dataset, data_dir)
        raw, where, source = path.read_bytes(), str(path), "folder"
    return Content(raw, where, Provenance(source, hashlib.sha256(raw).hexdigest()))


def _unpack(archive: Path, member: str) -> bytes:
    with zipfile.ZipFile(archive) as file:
        try:
            return file.read(member)
        except KeyError:
            raise ValueError(f"{archive} holds no {member}") from None


def _find_file(dataset: str, data_dir: str) -> Path:
    wanted = f"{dataset}.jsonl, from the data.zip of the LongBench data set"
    path = Path(data_dir) / f"{dataset}.jsonl"
    if not path.parent.is_dir():
        raise ValueError(f"data_dir={data_dir} is not a folder; {dataset} needs one that holds {wanted}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist; put there {wanted}")
    return path
