"""The files of the built-in data sets: generated into the cache folder on first use, and checked."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

# The demo data sets: tokens of a prompt, and the sha256 of their files.
FILES = {
    "demo_qa_512": (512, "844e4331e5ed6e0b81644be14fba27ec988d4b1c5183ee0e588066321a62fe47"),
    "demo_qa": (1024, "50836860e9dba194b97c8a9bc5c7a9e74b6fc48a537f579f8bae66542523d134"),
    "demo_qa_2048": (2048, "f5b5ea80a9bb399cd6220617c36c10b96e187f0e04c1ac6d7a740a4a472ef6a0"),
    "demo_qa_4096": (4096, "64076765ee0d4cbc1b5cab9a9dd4298eac9ff1e619b710ec4f7007912a7a6302"),
}
LONG_TEXT = "long_text"
SHA256 = {name: sha256 for name, (_, sha256) in FILES.items()} | {
    LONG_TEXT: "604b0b39c9a3f6e6ea47f15a4543f8f47830f587def2629b0ea7554488f7a8bf",
}


def built_in_file(dataset: str, cache_dir: str | None) -> Path:
    """Where the jsonl file of a built-in data set lies, or will: a file of another version has another name."""
    folder = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "cab-attention"
    return folder / "demo_qa" / f"{dataset}-{SHA256[dataset][:7]}.jsonl"


def generated(dataset: str) -> bytes:
    """The content of a built-in data set's file, made anew."""
    return "".join(json.dumps(row) + "\n" for row in _rows(dataset)).encode()


def demo_file(dataset: str, cache_dir: str | None) -> Path:
    """The jsonl file of a built-in data set: generated into the cache folder if it is not there, and checked.

    Raises ValueError, one line, if the folder cannot be written or the file is not what it should be.
    """
    path, sha256 = built_in_file(dataset, cache_dir), SHA256[dataset]
    if not path.is_file():
        content = generated(dataset)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(content)
            part.replace(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; give cache_dir=FOLDER, another place") from error
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: remove it, it is made again")
    return path


def _rows(dataset: str) -> list[dict[str, Any]]:
    """Rows of the families take turns, so that the first n are as good as balanced."""
    # These need torch, which is slow to import.
    if dataset == LONG_TEXT:
        from experiments.longbench_qa.demo.long_text import long_text_rows

        return long_text_rows()
    from experiments.longbench_qa.demo.rows import EVALUATED, evaluation_rows

    families = [evaluation_rows(family, FILES[dataset][0]) for family in EVALUATED]
    return [row for rows in zip(*families, strict=True) for row in rows]
