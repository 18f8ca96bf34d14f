"""The one list of methods that behaviours are crossed with: a new method is covered by adding a line."""

from collections.abc import Callable

from cab_attention import (
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

Make = Callable[[int | float | str], Method]

METHODS: dict[str, Make] = {
    "full": lambda budget: Full(),
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": lambda budget: SnapKV(budget, window=8),
    "pyramidkv": lambda budget: PyramidKV(budget, window=8, beta=2),
    "adakv": lambda budget: AdaKV(budget, window=8),
    "key_norm": KeyNorm,
    "key_diff": KeyDiff,
    "expected_attention": ExpectedAttention,
    "tova": TOVA,
    "cab": lambda budget: CAB(budget, block_size=4),
    "cab_redundancy": lambda budget: CAB(budget, block_size=4, bridge="redundancy"),
    "cab_median": lambda budget: CAB(budget, bridge="median"),
}
EVICTING = [name for name in METHODS if name != "full"]

# Methods with options that change what a cache holds from forward to forward.
VARIANTS: dict[str, Make] = {
    "h2o_layer": lambda budget: H2O(budget, granularity="layer"),
    "h2o_evict_every_3": lambda budget: H2O(budget, evict_every=3),
    "h2o_score_every_4": lambda budget: H2O(budget, score_queries="every:4"),
    "h2o_score_last_5": lambda budget: H2O(budget, score_queries="last:5"),
    "tova_evict_every_3": lambda budget: TOVA(budget, evict_every=3),
    "expected_attention_layer": lambda budget: ExpectedAttention(budget, granularity="layer"),
}
# The same, for models whose every layer has full attention.
FULL_ATTENTION_VARIANTS: dict[str, Make] = {
    "cab_model": lambda budget: CAB(budget, block_size=4, granularity="model"),
    "snapkv_model": lambda budget: SnapKV(budget, window=8, granularity="model"),
    "streaming_llm_compacted": lambda budget: StreamingLLM(budget, positions="compacted"),
    "adakv_compacted": lambda budget: AdaKV(budget, window=8, positions="compacted"),
    "h2o_all_options": lambda budget: H2O(
        budget, granularity="model", evict_every=3, positions="compacted", score_queries="every:4"
    ),
}
