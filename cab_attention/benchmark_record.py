"""What a benchmark of attention on a model records, and its pandas frame."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import pandas

MEASURED = ("prefill_ms", "decode_ms_per_token", "total_ms", "prompt_tokens_per_s", "new_tokens_per_s", "peak_bytes")


@dataclass(frozen=True)
class BenchmarkRecord:
    """One implementation on one prompt. Times are medians over the repeats; all are None where `problem` says why.

    Attributes:
        prompt_tokens: of the prompt as it was fed.
        repeated: the text was shorter than asked for and is repeated to that length.
        new_tokens: generated, the most likely one at each step.
        prefill_ms: from the prompt to the first token.
        decode_ms_per_token: None if there is only one token.
        total_ms: prefill and all decode steps.
        prompt_tokens_per_s, new_tokens_per_s: of the prefill, and of decode alone.
        attention_bytes: computed, not measured: what the prefill's attention holds in one layer beyond queries, keys
            and values (eager: the heads x N x N matrices; others: output, log-sum-exp, and for `cab` the scores).
        kv_cache_bytes: computed: keys and values of the prompt and the longest answer in all layers.
        peak_bytes: measured on a GPU: the peak of the generation beyond the weights; None on a CPU.
        token_ids, text: the answer.
    """

    implementation: str
    device: str
    dtype: str
    prompt_tokens: int
    repeated: bool
    repeats: int
    attention_bytes: int
    kv_cache_bytes: int
    new_tokens: int = 0
    prefill_ms: float | None = None
    decode_ms_per_token: float | None = None
    total_ms: float | None = None
    prompt_tokens_per_s: float | None = None
    new_tokens_per_s: float | None = None
    peak_bytes: int | None = None
    token_ids: tuple[int, ...] = ()
    text: str = ""
    problem: str = ""


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that differs; None if they are the same."""
    if len(tokens) == len(others) and all(map(int.__eq__, tokens, others)):
        return None
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(tokens), len(others)))


def as_frame(records: Sequence[BenchmarkRecord]) -> pandas.DataFrame:
    """A row a record; what was not measured is NaN."""
    frame = pandas.DataFrame(
        [asdict(record) for record in records], columns=[field.name for field in fields(BenchmarkRecord)]
    )
    return frame.astype(dict.fromkeys(MEASURED, "float64"))
