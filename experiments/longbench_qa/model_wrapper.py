"""A model that answers prompts with an evicting cache, and says what that took."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from cab_attention import EvictingCache, Full, Method
from experiments.longbench_qa.config import ModelConfig
from experiments.longbench_qa.encoding import encode_prompt
from experiments.longbench_qa.models import LoadedModel, load
from experiments.longbench_qa.prompts import FilledPrompt


@dataclass(frozen=True)
class Generation:
    """An answer and its cost. Memory in bytes, over the weights; None where there is no GPU to measure it on."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool
    compressed_tokens: int  # prompt tokens seen when the cache was cut
    budget_tokens: int  # what the budget came to
    kept_tokens: float  # right after the prompt, mean over layers and KV heads
    cache_bytes: int  # K and V right after the prompt
    bookkeeping_bytes: int  # positions and scores
    prefill_ms: float
    decode_ms_per_token: float | None  # None if the first token ended the answer
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None


class ModelWrapper:
    """The model of a `ModelConfig`, loaded once, driven with either attention."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._loaded: LoadedModel | None = None

    def load(self, force_eager_attention: bool = False) -> "ModelWrapper":
        """Load the weights if they are not, and choose the attention: `cab`, or the model's own eager attention."""
        if self._loaded is None:
            self._loaded = load(self.config)
        self._loaded.model.set_attn_implementation("eager_with_scores" if force_eager_attention else "cab")
        self._warm_up(self._loaded.model)
        return self

    @torch.inference_mode()
    def _warm_up(self, model: PreTrainedModel) -> None:
        """Let a GPU's libraries start and take their workspaces before anything is measured."""
        if model.device.type == "cuda":
            cache = EvictingCache(model.config, Full())
            for n_tokens in (64, 1):
                model(torch.zeros(1, n_tokens, dtype=torch.int64, device=model.device), past_key_values=cache)

    @property
    def loaded(self) -> LoadedModel:
        """Model and tokenizer; loads them with attention `cab` if that has not happened."""
        if self._loaded is None:
            self.load()
        assert self._loaded is not None
        return self._loaded

    @property
    def max_length(self) -> int:
        """Tokens of prompt and answer together."""
        context = getattr(self.loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if self.config.max_length is None:
            if context is None:
                raise ValueError(f"{self.config.name} does not say its context length: give model.max_length")
            return context
        if context is not None and self.config.max_length > context:
            raise ValueError(f"model.max_length={self.config.max_length}, the model's context is {context}")
        return self.config.max_length

    @torch.inference_mode()
    def generate(
        self,
        prompt: FilledPrompt | str,
        method: Method,
        *,
        max_new_tokens: int,
        compress: str = "after_prompt",
        chat_template: bool = True,
        stop_at_newline: bool = False,
        sample_id: str = "",
        on_compressed: Callable[[EvictingCache], None] | None = None,
    ) -> Generation:
        """Answer greedily: the argmax of the logits and nothing else.

        Args:
            prompt: text; filled from a template where `compress` needs to know the context's end.
            method: what to keep of the prompt (`after_prompt`) or of its context (`after_context`: what follows the
                context is kept and comes on top of the budget).
            sample_id: seeds methods that draw.
            on_compressed: called with the cache when the prompt is through.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if isinstance(prompt, str):
            if compress == "after_context":
                raise ValueError("compress='after_context' needs a filled prompt that says where its context ends")
            prompt = FilledPrompt(prompt, 0, len(prompt))
        encoded = encode_prompt(tokenizer, prompt, self.max_length - max_new_tokens, chat_template)
        n_prompt = len(encoded.ids)
        compress_at = encoded.context_end if compress == "after_context" else n_prompt
        _refuse_rope_switch(model.config, n_prompt, max_new_tokens)
        cache = EvictingCache(
            model.config, method, prompt_tokens=n_prompt, compress_at=compress_at, sample_ids=sample_id
        )
        stops = _stop_ids(model, tokenizer)
        meter = _MemoryMeter(model.device)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if output.past_key_values is not cache:
                raise RuntimeError(f"{self.config.name} went on with a cache of its own: nothing would be evicted")
            return output.logits[:, -1].argmax(-1, keepdim=True)

        ids = torch.tensor([encoded.ids], device=model.device)
        started = meter.start()
        token = forward(ids[:, :compress_at])
        if compress_at < n_prompt:
            token = forward(ids[:, compress_at:])
        answer = [int(token)]
        prefill_ms, prefill_peak = meter.stop(started)
        if on_compressed is not None:
            on_compressed(cache)
        kept = torch.stack([(layer.positions >= 0).sum(-1).double().mean() for layer in cache.layers]).mean().item()
        cache_bytes, bookkeeping_bytes = cache.cache_bytes, cache.bookkeeping_bytes

        started = meter.start()
        while len(answer) < max_new_tokens and answer[-1] not in stops:
            if stop_at_newline and "\n" in tokenizer.decode(answer[1:]):
                break
            token = forward(token)
            answer.append(int(token))
        decode_ms, decode_peak = meter.stop(started)
        cache.check_saw(n_prompt + len(answer) - 1)

        text = tokenizer.decode(answer[:-1] if answer[-1] in stops else answer, skip_special_tokens=True)
        return Generation(
            text=text,
            prompt_tokens=n_prompt,
            generated_tokens=len(answer),
            truncated=encoded.truncated,
            compressed_tokens=compress_at,
            budget_tokens=method.parsed_budget.tokens(compress_at),
            kept_tokens=kept,
            cache_bytes=cache_bytes,
            bookkeeping_bytes=bookkeeping_bytes,
            prefill_ms=prefill_ms,
            decode_ms_per_token=decode_ms / (len(answer) - 1) if len(answer) > 1 else None,
            prefill_peak_bytes=prefill_peak,
            decode_peak_bytes=decode_peak,
        )


class _MemoryMeter:
    """Wall time in ms, and peak memory over what is allocated now (the weights), where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device if device.type == "cuda" else None
        self.base = torch.cuda.memory_allocated(self.device) if self.device else 0

    def start(self) -> float:
        if self.device:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        return time.perf_counter()

    def stop(self, started: float) -> tuple[float, int | None]:
        if self.device:
            torch.cuda.synchronize(self.device)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        return elapsed_ms, torch.cuda.max_memory_allocated(self.device) - self.base if self.device else None


def _stop_ids(model: torch.nn.Module, tokenizer: object) -> frozenset[int]:
    """EOS ids of the generation config (there may be several) and of the tokenizer."""
    configured = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)  # type: ignore[attr-defined]


def _refuse_rope_switch(config: object, n_prompt: int, max_new_tokens: int) -> None:
    """LongRoPE models (Phi-3) change RoPE factors past `original_max_position_embeddings`: cached keys go stale."""
    rope = getattr(config, "rope_parameters", None) or {}
    switch = getattr(config, "original_max_position_embeddings", None)
    if rope.get("rope_type") == "longrope" and switch and n_prompt <= switch < n_prompt + max_new_tokens:
        raise ValueError(
            f"the answer would run over position {switch}, where this model switches its RoPE factors and a cache "
            "becomes stale: give a model.max_length on either side"
        )
