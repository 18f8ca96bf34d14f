"""KV-cache eviction for transformers, on attention that returns every key's cumulative score in O(N) memory.

Importing this package registers the attention implementations `cab` and `eager_with_scores` with transformers.
"""

from typing import TYPE_CHECKING, Any

from cab_attention.attention import (
    AttentionImplementation,
    get_available_implementations,
    load_model_with_attention,
)
from cab_attention.budget import Budget
from cab_attention.cache import EvictingCache
from cab_attention.generated_text import GeneratedText, TextStream
from cab_attention.kernels.flash_attention_accumulate import (
    FlashAttentionWithAccumulation,
    flash_attention_with_cumulative_scores,
    get_all_cumulative_scores,
    replace_attention_with_flash,
)
from cab_attention.kernels.tuning import tune_kernels
from cab_attention.methods import (
    CAB,
    H2O,
    TOVA,
    AdaKV,
    ExpectedAttention,
    Full,
    KeyDiff,
    KeyNorm,
    Method,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
)
from cab_attention.sampling import Sampling
from cab_attention.shared_prefill import SharedPrefill
from cab_attention.text_generation import TextGenerator, load_text_generator
from cab_attention.transformers_attention import register

if TYPE_CHECKING:
    from cab_attention.benchmark import AttentionBenchmark

__version__ = "0.1.0"

__all__ = [
    "CAB",
    "H2O",
    "TOVA",
    "AdaKV",
    "AttentionBenchmark",
    "AttentionImplementation",
    "Budget",
    "EvictingCache",
    "ExpectedAttention",
    "FlashAttentionWithAccumulation",
    "Full",
    "GeneratedText",
    "KeyDiff",
    "KeyNorm",
    "Method",
    "PyramidKV",
    "Random",
    "Sampling",
    "SharedPrefill",
    "SnapKV",
    "StreamingLLM",
    "TextGenerator",
    "TextStream",
    "flash_attention_with_cumulative_scores",
    "get_all_cumulative_scores",
    "get_available_implementations",
    "load_model_with_attention",
    "load_text_generator",
    "register",
    "replace_attention_with_flash",
    "tune_kernels",
]

register()


def __getattr__(name: str) -> Any:
    if name == "AttentionBenchmark":  # at its first use: it needs pandas
        from cab_attention.benchmark import AttentionBenchmark

        return AttentionBenchmark
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
