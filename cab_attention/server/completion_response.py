"""What a completion is answered with: OpenAI's fields, and what the cache kept and cost."""

from typing import Literal

from pydantic import BaseModel, Field

from cab_attention.generated_text import GeneratedText
from cab_attention.server.completion_plan import Finished, Plan


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CacheReport(BaseModel):
    """Times are wall clock; `queue_ms` is the wait for the request's turn, `prefill_ms` ends with the first token."""

    attention_implementation: str
    method: str
    budget: int | float | str
    seed: int
    kept_tokens: float = Field(description="Of the prompt, mean over layers and KV heads.")
    cache_bytes: int = Field(description="Keys and values at the end.")
    full_cache_bytes: int = Field(description="The same if nothing had been evicted, computed.")
    queue_ms: float
    prefill_ms: float
    decode_ms: float
    decode_ms_per_token: float | None
    peak_bytes: int | None = Field(description="GPU memory beyond the weights; null on a CPU.")
    kept_positions: list[list[list[int]]] | None = Field(
        None, description="With return_kept: of each layer and KV head, the prompt's tokens that the cut kept."
    )
    prompt_pieces: list[str] | None = Field(
        None,
        description="With return_kept: the prompt's text, token by token; null if the tokenizer cannot tell.",
    )


class Choice(BaseModel):
    text: str
    index: Literal[0] = 0
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """A completion, or a chunk of a streamed one: the last has the report, and one with no choices the usage."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    cab_attention: CacheReport | None = None


def usage_of(text: GeneratedText) -> Usage:
    return Usage(
        prompt_tokens=text.prompt_tokens,
        completion_tokens=text.completion_tokens,
        total_tokens=text.prompt_tokens + text.completion_tokens,
    )


def report_of(finished: Finished, plan: Plan, queue_ms: float) -> CacheReport:
    text = finished.text
    kept = [[head[head >= 0].tolist() for head in layer] for layer in text.kept_positions] if plan.return_kept else None
    return CacheReport(
        attention_implementation=text.implementation,
        method=text.method.name,
        budget=text.method.budget,
        seed=plan.sampling.seed,
        kept_tokens=text.kept_tokens,
        cache_bytes=text.cache_bytes,
        full_cache_bytes=text.full_cache_bytes,
        queue_ms=queue_ms,
        prefill_ms=text.prefill_ms,
        decode_ms=(text.decode_ms_per_token or 0.0) * (text.completion_tokens - 1),
        decode_ms_per_token=text.decode_ms_per_token,
        peak_bytes=text.peak_bytes,
        kept_positions=kept,
        prompt_pieces=finished.prompt_pieces,
    )
