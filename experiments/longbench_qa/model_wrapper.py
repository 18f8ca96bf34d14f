"""A model that answers prompts with an evicting cache, and says what that took."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from cab_attention import H2O, EvictingCache, Method
from experiments.longbench_qa.answer_kept import answer_tokens, share_kept
from experiments.longbench_qa.config import ModelConfig
from experiments.longbench_qa.encoding import chat_frame, encode_prompt
from experiments.longbench_qa.greedy import GreedyDecoder, stop_ids
from experiments.longbench_qa.memory import MemoryMeter, refuse_eager_that_cannot_fit
from experiments.longbench_qa.models import LoadedModel, load
from experiments.longbench_qa.prompts import FilledPrompt


@dataclass(frozen=True)
class Generation:
    """An answer and its cost. Peaks are over the weights; None where there is no GPU to measure them on."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    truncated: bool
    compressed_tokens: int  # prompt tokens seen when the cache was cut
    budget_tokens: int  # what the budget came to
    kept_tokens: float  # right after the prompt, mean over layers and KV heads
    answer_kept: float | None  # share of the answer's tokens in the context that survived; None if it has none
    effective: dict[str, int]  # the method's window and sinks at this budget
    cache_bytes: int  # K and V right after the prompt
    bookkeeping_bytes: int  # positions and scores
    prefill_ms: float
    decode_ms_per_token: float | None  # None if the first token ended the answer
    weights_bytes: int | None
    prefill_peak_bytes: int | None
    decode_peak_bytes: int | None
    total_peak_bytes: int | None


class ModelWrapper:
    """The model of a `ModelConfig`, loaded once, driven with either attention."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.eager = False
        self._warm: set[bool] = set()  # attentions that have run once
        self._loaded: LoadedModel | None = None

    def load(self, force_eager_attention: bool = False) -> "ModelWrapper":
        """Load the weights if they are not, and choose the attention: `cab`, or the model's own eager attention."""
        if self._loaded is None:
            self._loaded = load(self.config)
        self.eager = force_eager_attention
        self._loaded.model.set_attn_implementation("eager_with_scores" if force_eager_attention else "cab")
        if force_eager_attention not in self._warm:
            self._warm_up(self._loaded.model)
            self._warm.add(force_eager_attention)
        return self

    @torch.inference_mode()
    def _warm_up(self, model: PreTrainedModel) -> None:
        """Let a GPU's libraries start, compile and take their workspaces before anything is measured."""
        if model.device.type == "cuda":
            cache = EvictingCache(model.config, H2O(16))  # scores in the prefill and in decode
            for n_tokens in (64, 1):
                model(torch.zeros(1, n_tokens, dtype=torch.int64, device=model.device), past_key_values=cache)

    @property
    def loaded(self) -> LoadedModel:
        """Model and tokenizer; loads them with attention `cab` if that has not happened."""
        if self._loaded is None:
            self.load()
        assert self._loaded is not None
        return self._loaded

    def description(self) -> dict[str, Any]:
        """What was loaded, for the record."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return {
            "name": self.config.name,
            "path": self.config.path,
            "revision": self.loaded.revision,
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "attention": model.config._attn_implementation,
            "max_length": self.max_length,
            "stop_ids": sorted(stop_ids(model, tokenizer, stop_at_newline=False)),
            "chat_frame": chat_frame(tokenizer),
        }

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
        answers: Sequence[str] = (),
        on_compressed: Callable[[EvictingCache], None] | None = None,
    ) -> Generation:
        """Answer greedily: the argmax of the logits and nothing else.

        Args:
            prompt: text; filled from a template where `compress` needs to know the context's end.
            method: what to keep of the prompt (`after_prompt`) or of its context (`after_context`: what follows the
                context is kept and comes on top of the budget).
            sample_id: seeds methods that draw.
            answers: references, to look for in the context (`answer_kept`).
            on_compressed: called with the cache when the prompt is through.

        Raises:
            ValueError: the prompt does not fit. MemoryError: eager attention would not. FloatingPointError: the logits
            are not numbers. RuntimeError: the model did not use the cache.
        """
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        if isinstance(prompt, str):
            if compress == "after_context":
                raise ValueError("compress='after_context' needs a filled prompt that says where its context ends")
            prompt = FilledPrompt(prompt, 0, len(prompt))
        encoded = encode_prompt(tokenizer, prompt, self.max_length - max_new_tokens, chat_template)
        n_prompt = len(encoded.ids)
        compress_at = encoded.context_end if compress == "after_context" else n_prompt
        if self.eager:
            for first, last in ((0, compress_at), (compress_at, n_prompt)):
                refuse_eager_that_cannot_fit(model, last - first, last)
        cache = EvictingCache(
            model.config, method, prompt_tokens=n_prompt, compress_at=compress_at, sample_ids=sample_id
        )
        stops = stop_ids(model, tokenizer, stop_at_newline)
        decoder, meter = GreedyDecoder(model, cache), MemoryMeter(model.device)

        ids = torch.tensor([encoded.ids], device=model.device)
        started = meter.start()
        if compress_at < n_prompt:
            decoder.step(ids[:, :compress_at])
            ids = ids[:, compress_at:]
        # LongBench's authors let an answer that stops at a newline have at least one token.
        token, ids = decoder.step(ids, forbidden=stops if stop_at_newline else frozenset())
        answer = [token]
        prefill_ms, prefill_peak = meter.stop(started)
        if on_compressed is not None:
            on_compressed(cache)
        answer_kept = share_kept(answer_tokens(encoded, answers), [layer.positions for layer in cache.layers])
        kept = torch.stack([(layer.positions >= 0).sum(-1).double().mean() for layer in cache.layers]).mean().item()
        cache_bytes, bookkeeping_bytes = cache.cache_bytes, cache.bookkeeping_bytes

        started = meter.start()
        while len(answer) < max_new_tokens and answer[-1] not in stops:
            token, ids = decoder.step(ids)
            answer.append(token)
        decode_ms, decode_peak = meter.stop(started)
        cache.check_saw(n_prompt + len(answer) - 1)

        budget_tokens = method.parsed_budget.tokens(compress_at)
        peaks = [peak for peak in (prefill_peak, decode_peak) if peak is not None]
        text = tokenizer.decode(answer[:-1] if answer[-1] in stops else answer, skip_special_tokens=True)
        return Generation(
            text=text,
            prompt_tokens=n_prompt,
            generated_tokens=len(answer),
            truncated=encoded.truncated,
            compressed_tokens=compress_at,
            budget_tokens=budget_tokens,
            kept_tokens=kept,
            answer_kept=answer_kept,
            effective=method.effective(budget_tokens),
            cache_bytes=cache_bytes,
            bookkeeping_bytes=bookkeeping_bytes,
            prefill_ms=prefill_ms,
            decode_ms_per_token=decode_ms / (len(answer) - 1) if len(answer) > 1 else None,
            weights_bytes=meter.weights_bytes,
            prefill_peak_bytes=prefill_peak,
            decode_peak_bytes=decode_peak,
            total_peak_bytes=meter.weights_bytes + max(peaks) if meter.weights_bytes is not None else None,
        )
