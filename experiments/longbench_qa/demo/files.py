"""The files of the demo data sets: generated into the cache folder on first use, and checked."""

import hashlib
import json
import os
from pathlib import Path

# The data sets, and the sha256 of their files.
FILES = {
    "demo_qa_512": (512, "844e4331e5ed6e0b81644be14fba27ec988d4b1c5183ee0e588066321a62fe47"),
    "demo_qa": (1024, "50836860e9dba194b97c8a9bc5c7a9e74b6fc48a537f579f8bae66542523d134"),
    "demo_qa_2048": (2048, "f5b5ea80a9bb399cd6220617c36c10b96e187f0e04c1ac6d7a740a4a472ef6a0"),
    "demo_qa_4096": (4096, "64076765ee0d4cbc1b5cab9a9dd4298eac9ff1e619b710ec4f7007912a7a6302"),
}


def demo_file(dataset: str, cache_dir: str | None) -> Path:
    """The jsonl file of a demo data set: generated into the cache folder if it is not there, and checked.

    Rows of the families take turns, so that the first n are as good as balanced.
    Raises ValueError, one line, if the folder cannot be written or the file is not what it should be.
    """
    length, sha256 = FILES[dataset]
    folder = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "cab-attention"
    path = folder / "demo_qa" / f"{dataset}-{sha256[:7]}.jsonl"
    if not path.is_file():
        from experiments.longbench_qa.demo.rows import (  # needs torch, which is slow to import
            EVALUATED,
            evaluation_rows,
        )

        families = [evaluation_rows(family, length) for family in EVALUATED]
        lines = [json.dumps(row) + "\n" for rows in zip(*families, strict=True) for row in rows]
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text("".join(lines), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}; give cache_dir=FOLDER, another place") from error
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: remove it, it is made again")
    return path
