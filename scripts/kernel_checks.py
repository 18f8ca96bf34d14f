"""Inputs of a measurement, and what a provider's result must be: sampled rows and columns, computed directly."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_LOGITS = 2**28  # logits held at once by the reference, in elements
FLOAT64_LOGITS = 2**28  # up to so many logits the reference is float64 throughout, beyond it the row sums are float32
SAMPLED_ROWS, SAMPLED_COLUMNS = 16, 64

# What rounding may do. Eager rounds its logits to the input's dtype: half a unit of bfloat16 at 8 is 0.03, and a row
# with few large weights, or a column that one row sees, shows all of it. A wrong mask, scale or head is far outside.
OUTPUT_ERROR = 0.01  # of all sampled rows together, relative to their norm
ROW_ERROR = 0.1  # of one row, relative to its norm
LSE_ERROR = 0.02  # absolute
SCORES_ERROR = 0.01  # of all sampled columns together, relative to their norm
COLUMN_ERROR = 0.06  # of one column, relative ...
COLUMN_SLACK = 1e-6  # ... plus this much, absolute
MEAN_SLACK = 2.0**-24  # the same for column means in float16, whose small values are this far apart
TOTAL_ERROR = 0.005  # a head's scores sum to the number of rows that count, relative


@dataclass(frozen=True)
class Shape:
    """One size of attention. Causal is bottom-right aligned; `score_queries` is as in the operator."""

    n_queries: int
    n_keys: int
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True
    score_queries: int | None = None

    @property
    def counted_rows(self) -> int:
        return self.n_queries if self.score_queries is None else min(self.score_queries, self.n_queries)

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def kv_bytes(self) -> int:
        return 2 * self.batch * self.kv_heads * self.n_keys * self.head_dim * self.itemsize

    @property
    def q_bytes(self) -> int:
        """Of the queries, and of the output."""
        return self.batch * self.heads * self.n_queries * self.head_dim * self.itemsize


@dataclass(frozen=True)
class Inputs:
    """q [B, H, Q, D]; k, v [B, G, K, D]."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5


class Result(NamedTuple):
    """What a provider computes; None for what it does not."""

    output: Tensor | None = None  # [B, H, Q, D]
    scores: Tensor | None = None  # [B, H, K]
    lse: Tensor | None = None  # [B, H, Q], natural logarithm
    mean_scores: Tensor | None = None  # [B, K]: mean over heads and queries


@dataclass(frozen=True)
class Expected:
    """The right result on sampled `rows` and `columns`, in float64; lse of all rows."""

    shape: Shape
    rows: Tensor
    columns: Tensor
    output: Tensor  # [B, H, rows, D]
    scores: Tensor  # [B, H, columns]
    lse: Tensor  # [B, H, Q]


def make_inputs(shape: Shape, device: torch.device | str, seed: int = 0) -> Inputs:
    """Random inputs. The queries of a head share a direction, so that some keys are looked at far more than others."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    dtype = getattr(torch, shape.dtype)
    shared = draw(shape.batch, shape.heads, 1, shape.head_dim)
    q = draw(shape.batch, shape.heads, shape.n_queries, shape.head_dim).add_(shared).to(dtype)
    k, v = (draw(shape.batch, shape.kv_heads, shape.n_keys, shape.head_dim).to(dtype) for _ in range(2))
    return Inputs(shape, q, k, v)


def expect(inputs: Inputs) -> Expected:
    """Compute the sample directly. Float64 on small shapes; on large ones only the row sums are float32."""
    shape, device = inputs.shape, inputs.q.device
    logits_of_a_row = shape.batch * shape.heads * shape.n_keys
    dtype = torch.float64 if logits_of_a_row * shape.n_queries <= FLOAT64_LOGITS else torch.float32
    lse = torch.empty(shape.batch, shape.heads, shape.n_queries, dtype=torch.float64, device=device)
    block = max(1, BLOCK_LOGITS // logits_of_a_row)
    for start in range(0, shape.n_queries, block):
        rows = torch.arange(start, min(start + block, shape.n_queries), device=device)
        seen = shape.n_keys - shape.n_queries + start + len(rows) if shape.causal else shape.n_keys
        lse[:, :, start : start + len(rows)] = _logits(inputs, rows, range(seen), dtype).logsumexp(-1)

    rows = _sample(shape.n_queries, SAMPLED_ROWS, device)
    weights = (_logits(inputs, rows, range(shape.n_keys), torch.float64) - lse[:, :, rows, None]).exp_()
    grouped = weights.unflatten(1, (shape.kv_heads, -1)).flatten(2, 3) @ inputs.v.double()
    output = grouped.view(shape.batch, shape.heads, len(rows), shape.head_dim)

    columns = _sample(shape.n_keys, SAMPLED_COLUMNS, device)
    counted = torch.arange(shape.n_queries - shape.counted_rows, shape.n_queries, device=device)
    scores = torch.zeros(shape.batch, shape.heads, len(columns), dtype=torch.float64, device=device)
    for rows_block in counted.split(max(1, BLOCK_LOGITS // (shape.batch * shape.heads * len(columns)))):
        logits = _logits(inputs, rows_block, columns, torch.float64)
        scores += (logits - lse[:, :, rows_block, None]).exp_().sum(2)
    return Expected(shape, rows, columns, output, scores, lse)


def _sample(size: int, count: int, device: torch.device) -> Tensor:
    """Sorted indices below `size`: the first, the last and random ones; all of them if there are no more."""
    if size <= count:
        return torch.arange(size, device=device)
    drawn = torch.randperm(size - 2, generator=torch.Generator().manual_seed(0))[: count - 2] + 1
    return torch.cat([torch.tensor([0, size - 1]), drawn]).sort().values.to(device)


def _logits(inputs: Inputs, rows: Tensor, columns: Tensor | range, dtype: torch.dtype) -> Tensor:
    """Masked logits [B, H, rows, columns]; a range of columns begins at 0."""
    shape = inputs.shape
    if isinstance(columns, range):
        k, at = inputs.k[:, :, : len(columns)], torch.arange(len(columns), device=rows.device)
    else:
        k, at = inputs.k[:, :, columns], columns
    q = inputs.q[:, :, rows].to(dtype).mul_(inputs.scale)
    logits = q.unflatten(1, (shape.kv_heads, -1)).flatten(2, 3) @ k.to(dtype).mT
    logits = logits.view(shape.batch, shape.heads, len(rows), len(at))
    if shape.causal:
        logits.masked_fill_(at > rows[:, None] + shape.n_keys - shape.n_queries, -torch.inf)
    return logits


def problem_with(result: Result, expected: Expected) -> str | None:
    """Why the result is wrong, in one line, or None. NaN is wrong."""
    if all(part is None for part in result):
        return "it returned nothing"
    checks = []
    if result.output is not None:
        error = result.output[:, :, expected.rows].double() - expected.output
        of_a_row = (error.norm(dim=-1) / expected.output.norm(dim=-1)).max()
        checks.append(("relative error of the output", (error.norm() / expected.output.norm()).item(), OUTPUT_ERROR))
        checks.append(("relative error of an output row", of_a_row.item(), ROW_ERROR))
    if result.lse is not None:
        checks.append(("error of lse", (result.lse.double() - expected.lse).abs().max().item(), LSE_ERROR))
    n_rows = expected.shape.counted_rows
    if result.scores is not None:
        checks += _column_checks(result.scores, expected.scores, expected.columns, n_rows, COLUMN_SLACK)
    if result.mean_scores is not None:
        mean = expected.scores.mean(1) / n_rows
        checks += _column_checks(result.mean_scores, mean, expected.columns, 1, MEAN_SLACK)
    problems = [f"{what} {error:.2g}, allowed {allowed:g}" for what, error, allowed in checks if not error <= allowed]
    return "; ".join(problems) or None


def _column_checks(
    scores: Tensor, expected: Tensor, columns: Tensor, total: float, slack: float
) -> list[tuple[str, float, float]]:
    """(what, error, allowed) of scores [..., K] against `expected` [..., columns]; all keys sum to `total`."""
    scores = scores.double()
    error = scores[..., columns] - expected
    beyond_slack = (error.abs() - slack).clamp_(min=0) / expected
    return [
        ("relative error of the scores", (error.norm() / expected.norm()).item(), SCORES_ERROR),
        ("relative error of a score", beyond_slack.max().item(), COLUMN_ERROR),
        ("relative error of the scores' sum", (scores.sum(-1) / total - 1).abs().max().item(), TOTAL_ERROR),
    ]
