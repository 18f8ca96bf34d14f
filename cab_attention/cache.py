"""EvictingCache: a transformers cache that keeps a method's choice of keys, layer by layer, right after attention."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cab_attention.cache_layer import CANNOT_GO_BACK, IMPLEMENTATIONS, EvictingLayer
from cab_attention.methods.base import Method
from cab_attention.prompt import Prompt
from cab_attention.tensor_parallel import check_heads_divide


class EvictingCache(Cache):
    """A KV cache that evicts: `model.generate(ids, past_key_values=EvictingCache(model.config, method))`.

    Each layer is cut right after its attention in the forward that ends the prompt, so the peak of a prefill is one
    full layer and the budgets (where the whole model chooses together, all layers are cut after the last). Methods that
    evict in decode cut again, after every step or every few.

    Args:
        config: the model's config; its attention implementation must be `cab` or `eager_with_scores`.
        method: what to keep.
        prompt_tokens: length of the prompt, padding included. Default: the first forward is the whole prompt. Needed
            for a prompt fed in chunks: nothing is cut before its end, unless the method evicts after each chunk.
        compress_at: cut after this many tokens of the prompt instead of after all. What follows in the prompt is kept
            and comes on top of the budget.
        sample_ids: names that seed `Random`, one for the batch or one a row.
    """

    layers: list[EvictingLayer]  # type: ignore[assignment]

    def __init__(
        self,
        config: PreTrainedConfig,
        method: Method,
        *,
        prompt_tokens: int | None = None,
        compress_at: int | None = None,
        sample_ids: str | Sequence[str] | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        if config._attn_implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"EvictingCache works with attn_implementation in {IMPLEMENTATIONS}, "
                f"this model has {config._attn_implementation!r}"
            )
        if prompt_tokens is not None and prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens}, allowed is >= 1")
        if compress_at is not None and (prompt_tokens is None or not 1 <= compress_at <= prompt_tokens):
            raise ValueError(f"compress_at={compress_at} needs prompt_tokens={prompt_tokens} of at least as many")
        ids = (sample_ids,) if isinstance(sample_ids, str) else tuple(sample_ids) if sample_ids else None
        self.prompt = Prompt(prompt_tokens, compress_at, ids)
        self.method = method
        check_heads_divide(config, getattr(getattr(config, "distributed_config", None), "tp_size", None) or 1)
        windows = _sliding_windows(config)
        for option in ("granularity", "positions"):
            value = getattr(method, option)
            if value in ("model", "compacted") and any(windows):
                raise ValueError(
                    f"{option}={value!r} needs full attention in every layer, {config.model_type} has some that slide"
                )
        layers: list[EvictingLayer] = []
        for index, window in enumerate(windows):
            # Only the last layer knows the others: a reference cycle would keep the cache's memory.
            earlier = tuple(layers) if method.granularity == "model" and index == len(windows) - 1 else ()
            peers = windows[:index].count(window), windows.count(window)
            layers.append(
                EvictingLayer(method, self.prompt, index, window, _rope_switch(config), earlier, len(windows), peers)
            )
        super().__init__(layers=layers)  # type: ignore[arg-type]

    @property
    def cache_bytes(self) -> int:
        """Storage of K and V over all layers, in bytes."""
        return sum(layer.cache_bytes for layer in self.layers)

    @property
    def bookkeeping_bytes(self) -> int:
        """Storage of positions and scores over all layers, in bytes."""
        return sum(layer.bookkeeping_bytes for layer in self.layers)

    def check_saw(self, n_tokens: int) -> None:
        """Raise RuntimeError unless every layer saw `n_tokens`: all of a generation's output but its last token.

        Some models (Phi-3, beyond `original_max_position_embeddings`) silently go on with a cache of their own; the
        text would then be that of a full cache. A prompt shorter than `prompt_tokens` said is found here too: nothing
        was cut. With beams the layers may have seen more, from a longer beam that lost.
        """
        seen = sorted({layer.seen for layer in self.layers})
        if len(seen) != 1 or seen[0] < n_tokens:
            raise RuntimeError(
                f"the model did not use the EvictingCache for the whole generation: its layers saw {seen} tokens "
                f"of {n_tokens}"
            )
        if self.method.evicts and any(layer.budget_tokens is None for layer in self.layers):
            raise RuntimeError(f"nothing was cut: the prompt of {self.prompt.tokens} tokens never came to its end")

    def reset(self) -> None:
        """Forget everything: the next forward begins a new prompt, of any length where none was given."""
        super().reset()
        self.prompt.first_forward = None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(CANNOT_GO_BACK)

    def activate_past_recording(self) -> None:
        raise ValueError(CANNOT_GO_BACK)


def _rope_switch(config: PreTrainedConfig) -> int | None:
    """The length past which a LongRoPE model (Phi-3) rotates all keys by other factors."""
    rope = getattr(config, "rope_parameters", None) or {}
    return config.original_max_position_embeddings if rope.get("rope_type") == "longrope" else None


def _sliding_windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's sliding window (None: full attention), as transformers' own cache reads it from the config."""
    windows: list[int | None] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif type(layer) is DynamicSlidingWindowLayer and not getattr(config, "attention_chunk_size", None):
            windows.append(layer.sliding_window)
        else:
            raise ValueError(
                f"{config.model_type}: layer {index} caches by {type(layer).__name__}; "
                "EvictingCache knows full and sliding-window attention"
            )
    return windows
