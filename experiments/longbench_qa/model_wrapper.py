"""A model that answers prompts with an evicting cache, and says what that took."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from cab_attention import H2O, EvictingCache, Full, Method, SharedPrefill
from experiments.longbench_qa import ranks
from experiments.longbench_qa.answer_kept import answer_tokens
from experiments.longbench_qa.encoding import chat_frame, encode_prompt
from experiments.longbench_qa.generation import Generation, Task, of_all_ranks, positions_of
from experiments.longbench_qa.greedy import stop_ids
from experiments.longbench_qa.memory import (
    MemoryMeter,
    devices_of,
    free_memory,
    one_after_the_other,
    refuse_eager_that_cannot_fit,
)
from experiments.longbench_qa.models import LoadedModel, load
from experiments.longbench_qa.plain_cache import PlainCache
from experiments.longbench_qa.prompts import FilledPrompt
from experiments.longbench_qa.schema import ModelConfig


class Options(TypedDict, total=False):
    """How to answer a prompt, beside the method.

    compress: cut after the prompt (`after_prompt`) or after its context (`after_context`: what follows the context is
        kept and comes on top of the budget).
    first_token: comes from the `full` cache, which is cut after the whole prompt, or from the `compressed` one: the
        prompt but its last token is cut, then the last is fed as a decode step. No choice where a part of the prompt
        follows the context that is cut: it comes from the compressed cache.
    truncate: what of a too long prompt is cut away, its `middle`, its `left` or its `right` end.
    chat_template: put the model's around the prompt, where it has one.
    prefill_chunk: tokens of the prompt that one forward takes at most.
    sample_id: seeds methods that draw.
    answers: references, to look for in the context (`answer_kept`), unless
    answer_span: says in which of the context's characters the answer stands.
    on_compressed: called with a method's cache when the whole prompt is through, before decode.
    """

    max_new_tokens: Required[int]
    compress: str  # default: after_prompt
    first_token: str  # default: full
    truncate: str  # default: middle
    chat_template: bool  # default: true
    prefill_chunk: int | None  # default: None, no limit
    stop_at_newline: bool  # default: false
    sample_id: str
    answers: Sequence[str]
    answer_span: tuple[int, int] | None
    on_compressed: Callable[[EvictingCache], None]


# The names of `attention` in a config, as transformers knows them: with scores, and torch's own without.
IMPLEMENTATIONS = {"cab": "cab", "eager": "eager_with_scores", "sdpa": "sdpa"}


class ModelWrapper:
    """The model of a `ModelConfig`, loaded once, driven with any attention."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.attention = "cab"
        self._warm: set[str] = set()  # attentions that have run once
        self._loaded: LoadedModel | None = None

    def load(self, attention: str = "cab") -> "ModelWrapper":
        """Load the weights if they are not, and choose the attention: `cab`, `eager` or `sdpa`."""
        ranks.lead(self.config, "load", attention=attention)
        with ranks.in_step():
            if self._loaded is None:
                self._loaded = load(self.config)
            self.attention = attention
            self._loaded.model.set_attn_implementation(IMPLEMENTATIONS[attention])
            if attention not in self._warm:
                self._warm_up(self._loaded.model)
                self._warm.add(attention)
        return self

    @torch.inference_mode()
    def _warm_up(self, model: PreTrainedModel) -> None:
        """Let a GPU's libraries start, compile and take their workspaces before anything is measured."""
        if model.device.type == "cuda":
            cache: EvictingCache | PlainCache
            if self.attention == "sdpa":
                cache = PlainCache(model.config, Full())
            else:
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
            "device": ", ".join(map(str, devices_of(model))),
            "ranks": ranks.n_ranks(),  # that each hold a part of every layer, on a device of that name
            "attention": model.config._attn_implementation,
            "max_length": self.max_length,
            "stop_ids": sorted(stop_ids(model, tokenizer, stop_at_newline=False)),
            "chat_frame": chat_frame(tokenizer),
        }

    def require_chat_template(self) -> None:
        """Raise ValueError if the model's tokenizer has no chat template."""
        if self.loaded.tokenizer.chat_template is None:
            raise ValueError(f"chat_template=always: {self.config.name} has no chat template, allowed: official, never")

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

    def generate(self, prompt: FilledPrompt | str, method: Method, **options: Unpack[Options]) -> Generation:
        """Answer greedily: the argmax of the logits and nothing else.

        Args:
            prompt: text; filled from a template where `compress` needs to know the context's end.
            method: what to keep of the prompt or of its context.
            options: as `Options` says.

        Raises:
            ValueError: the prompt does not fit. MemoryError: eager attention would not. FloatingPointError: the logits
            are not numbers. RuntimeError: the model did not use the cache.
        """
        self._lead("generate", options, prompt=prompt, method=method)
        return self._generate(prompt, method, options)

    def _lead(self, name: str, options: Options, **arguments: Any) -> None:
        """Have the other ranks, if there are, make the same call."""
        if self._loaded is None:  # a call of its own
            self.load()
        if ranks.n_ranks() > 1 and "on_compressed" in options:
            raise ValueError("on_compressed is for one process: each rank's cache holds a part of the heads")
        ranks.lead(self.config, name, **arguments, **options)

    @torch.inference_mode()
    def _generate(self, prompt: FilledPrompt | str, method: Method, options: Options) -> Generation:
        with ranks.in_step():
            task, meter = self._task(prompt, [method], options), self._meter()
            cache = task.new_cache(method)
            started = meter.start()
            next_token = task.feed_to_cut(cache)
            to_cut = meter.stop(started)
            kept = task.kept(cache)  # takes its own time
            started = meter.start()
            next_token = task.feed_rest(cache, next_token)
            prefill = one_after_the_other(to_cut, meter.stop(started))
            if "on_compressed" in options:
                options["on_compressed"](cache)
            generation = task.answer(cache, next_token, kept, meter, prefill)
        return of_all_ranks(ranks.gather(generation))

    def _meter(self) -> MemoryMeter:
        return MemoryMeter(*devices_of(self.loaded.model))

    def generate_each(
        self, prompt: FilledPrompt | str, methods: Sequence[Method], **options: Unpack[Options]
    ) -> list[Generation | Exception]:
        """`generate` for each method, from one prefill: in the methods' order their answers, or what each raised.

        The answers are those of `generate`. Where the shared prefill raises, which may be one method's fault alone,
        each method gets its own; so it does with `prefill_chunk`, since a prefill in chunks is not shared.
        """
        self._lead("generate_each", options, prompt=prompt, methods=methods)
        if len(methods) > 1 and options.get("prefill_chunk") is None:
            try:
                return self._generate_together(prompt, methods, options)
            except ranks.OutOfStepError:
                raise
            except Exception as error:
                if not ranks.is_follower():
                    print(f"no shared prefill for {options.get('sample_id', 'this prompt')}: {error}", file=sys.stderr)
            free_memory()  # only now, with the traceback gone, is nothing of the failed forward held any more
        return [_caught(partial(self._generate, prompt, method, options)) for method in methods]

    @torch.inference_mode()
    def _generate_together(
        self, prompt: FilledPrompt | str, methods: Sequence[Method], options: Options
    ) -> list[Generation | Exception]:
        with ranks.in_step():
            task, meter = self._task(prompt, methods, options), self._meter()
            caches = [task.new_cache(method) for method in methods]
            next_token = task.feed_to_cut(SharedPrefill(caches))

        def go_on() -> Generation:
            with ranks.in_step():
                cache = caches.pop(0)  # so that it is freed when it has answered
                kept = task.kept(cache)
                own_token = task.feed_rest(cache, next_token)
                if "on_compressed" in options:
                    options["on_compressed"](cache)
                generation = task.answer(cache, own_token, kept, meter, prefill=None)
            return of_all_ranks(ranks.gather(generation))

        return [_caught(go_on) for _ in methods]

    def kept_positions(
        self, prompt: FilledPrompt | str, methods: Sequence[Method], **options: Unpack[Options]
    ) -> tuple[Task, list[list[Tensor]]]:
        """What `generate_each` would cut the prompt to, from one prefill and without an answer.

        Returns:
            The encoded prompt; by method and layer, int64 [KV heads, kept] on the CPU: the positions in the cache right
            after the cut, -1 for an empty slot, at the front.
        """
        self._lead("kept_positions", options, prompt=prompt, methods=methods)
        with ranks.in_step(), torch.inference_mode():
            task = self._task(prompt, methods, options)
            caches = [task.new_cache(method) for method in methods]
            task.feed_to_cut(SharedPrefill(caches) if len(caches) > 1 else caches[0])
            own = [[layer[0].cpu() for layer in positions_of(cache)] for cache in caches]
        by_method = zip(*ranks.gather(own), strict=True)
        return task, [[_all_heads(layer) for layer in zip(*layers, strict=True)] for layers in by_method]

    def _task(self, prompt: FilledPrompt | str, methods: Sequence[Method], options: Options) -> Task:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        max_new_tokens, after_context = options["max_new_tokens"], options.get("compress") == "after_context"
        if isinstance(prompt, str):
            if after_context:
                raise ValueError("compress='after_context' needs a filled prompt that says where its context ends")
            prompt = FilledPrompt(prompt, 0, len(prompt))
        encoded = encode_prompt(
            tokenizer,
            prompt,
            self.max_length - max_new_tokens,
            options.get("chat_template", True),
            options.get("truncate", "middle"),
        )
        compress_at = decode_from = len(encoded.ids)
        if after_context:
            compress_at = encoded.context_end
        if options.get("first_token") == "compressed" and compress_at == decode_from:
            compress_at = decode_from = decode_from - 1
            if not compress_at:
                raise ValueError("first_token=compressed needs a prompt of 2 tokens or more, this one has 1")
        task = Task(
            model=model,
            tokenizer=tokenizer,
            encoded=encoded,
            compress_at=compress_at,
            decode_from=decode_from,
            prefill_chunk=options.get("prefill_chunk"),
            max_new_tokens=max_new_tokens,
            stop_at_newline=options.get("stop_at_newline", False),
            sample_id=options.get("sample_id", ""),
            answer_tokens=answer_tokens(encoded, options.get("answers", ()), options.get("answer_span")),
        )
        if self.attention == "eager":
            for first, last in task.forwards():
                n_keys = max(task.most_keys(method, first, last) for method in methods)
                refuse_eager_that_cannot_fit(model, last - first, n_keys)
        return task


def _all_heads(parts: Sequence[Tensor]) -> Tensor:
    """[KV heads of all ranks, kept] of the positions that each has, which may be of different numbers."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([functional.pad(part, (width - part.shape[-1], 0), value=-1) for part in parts])


def _caught(answer: Callable[[], Generation]) -> Generation | Exception:
    try:
        return answer()
    except ranks.OutOfStepError:
        raise
    except Exception as error:
        failure = error.with_traceback(None)  # the traceback would hold the failed forward's memory
        failure.__cause__ = failure.__context__ = None
    free_memory()
    return failure
