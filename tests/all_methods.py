"""The one list of methods that behaviours are crossed with: a new method is covered by adding a line."""

from collections.abc import Callable

from cab_attention import CAB, H2O, TOVA, Full, Method, Random, SnapKV, StreamingLLM

METHODS: dict[str, Callable[[int | float | str], Method]] = {
    "full": lambda budget: Full(),
    "random": Random,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "snapkv": lambda budget: SnapKV(budget, window=8),
    "tova": TOVA,
    "cab": lambda budget: CAB(budget, block_size=4),
    "cab_redundancy": lambda budget: CAB(budget, block_size=4, bridge="redundancy"),
    "cab_median": lambda budget: CAB(budget, bridge="median"),
}
EVICTING = [name for name in METHODS if name != "full"]
