"""Cells written by hand in the harness's format: for tests of what is made of records, without a model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cab_attention import Full, Method
from experiments.longbench_qa.data import load_data
from experiments.longbench_qa.prompts import load_prompt
from experiments.longbench_qa.records import FORMAT
from tests.experiments.cells import demo_cell

N = 3
HEADS = [[0.0, 0.5], [1.0, 0.25]]  # 2 layers of 2 KV heads
ROWS, DATA = load_data("demo_qa", None, N, store=False)
ENVIRONMENT = {"commit": "abc-dirty", "python": "3.12.1", "packages": {"torch": "2.12"}, "gpu": None}


def write_cell(
    output_dir: Path,
    method: Method,
    scores: Sequence[float | None],
    predictions: Mapping[int, str] | None = None,
    values: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A cell of the first rows of demo_qa, with these scores; None: that sample failed. Returns its folder."""
    cell = demo_cell(output_dir, method=method, **changes)
    _, prompt = load_prompt("demo_qa")
    size = None if isinstance(method, Full) else int(method.parsed_budget.tokens(900))
    common = {
        **dict.fromkeys(("prompt_tokens", "compressed_tokens"), 900),
        **dict.fromkeys(("generated_tokens", "bookkeeping_bytes"), 4),
        **dict.fromkeys(("budget_tokens", "kept_tokens"), size or 900),
        **dict.fromkeys(("weights_bytes", "prefill_peak_bytes", "decode_peak_bytes", "total_peak_bytes")),
        **{"prefill_ms": None, "decode_ms_per_token": 2.5, "truncated": False, "prefill_shared": True},
        **{"cache_bytes": 1024 * (size or 900), "kept_by_layer": [float(size or 900)] * 2},
        **{"answer_kept": 0.4375, "answer_kept_heads": HEADS, "effective": {}},
    }
    lines = []
    for index, (row, score) in enumerate(zip(ROWS, scores, strict=False)):
        sample = {"id": row.id, "answers": row.answers, "score": score, "error": None, "prediction": f"answer {score}"}
        sample["prediction"] = (predictions or {}).get(index, sample["prediction"])
        if score is None:
            sample |= {"error": "RuntimeError: no <memory> left", "prediction": None}
        else:
            sample |= common | (values or {})
        lines.append(json.dumps(sample) + "\n")
    identity = cell.identity() | {"data_sha256": DATA.sha256, "prompt_sha256": prompt.sha256}
    metrics = {
        "format": FORMAT,
        "status": "complete" if len(scores) == N and None not in scores else "incomplete",
        "n_rows": N,
        "budget_kind": method.parsed_budget.kind,
        "config": cell.full_config(),
        "model": {"name": "tiny", "parameters": 12345, "dtype": "float32", "device": "cpu"},
        "data": {"source": DATA.source, "sha256": DATA.sha256},
        "prompt": {"source": prompt.source, "sha256": prompt.sha256},
        "environments": [ENVIRONMENT],
    }
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.json").write_text(json.dumps({"format": FORMAT, **identity}))
    (cell.folder / "predictions.jsonl").write_text("".join(lines))
    (cell.folder / "metrics.json").write_text(json.dumps(metrics))
    return cell.folder
