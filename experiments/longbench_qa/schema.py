"""The schema of conf/: what a user may configure, with the defaults, before anything of it is checked."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class ModelConfig:
    """A model.

    `kind`: `demo` (built in, trained on demo_qa's language), `tiny` (built in, random weights), `random` (a named
    `shape`, random weights) or `path` (folder or hub id).
    """

    name: str | None = None  # in folders and tables; default: the last part of `path`
    kind: str = MISSING
    path: str | None = None
    shape: str | None = None
    revision: str | None = None  # of a hub id
    trust_remote_code: bool = False
    use_safetensors: bool = True  # false also reads pickled weights, which can run code
    dtype: str | None = None  # default: the checkpoint's; float32 for demo and tiny, bfloat16 for random
    max_length: int | None = None  # prompt and answer together, in tokens; default: the model's context
    device: str | None = None  # default: the GPU if there is one
    device_map: str | None = None  # auto: layers spread over this process's GPUs
    tp_plan: str | None = None  # auto: each layer divided among the processes that torchrun started


@dataclass
class DatasetConfig:
    """A data set: its name is its file's stem; generation length in tokens; what LongBench's authors do with it."""

    name: str = MISSING
    max_new_tokens: int = MISSING
    chat_template: bool = True
    stop_at_newline: bool = False


@dataclass
class AttentionConfig:
    """`cab`, `eager` (the model's own: the independent check) or, for the full cache, `sdpa` (torch's, no scores)."""

    name: str = "cab"


@dataclass
class WandbConfig:
    """One Weights & Biases run a cell."""

    mode: str = "offline"
    project: str = "cab-attention"
    group: str | None = None


@dataclass
class RunConfig:
    """conf/config.yaml, which says what each key is: typos and wrong types are refused before anything loads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    budget: Any = 128
    compress: str = "after_prompt"
    first_token: str = "full"
    truncate: str = "middle"
    chat_template: str = "official"
    prefill_chunk: int | None = None
    granularity: str = "head"
    evict_every: int = 1
    evict_in_prefill: str = "end"
    score_queries: str = "all"
    positions: str = "original"
    max_samples: int | None = None
    seed: int = 0
    data_dir: str | None = None
    prompts: str | None = None
    prompts_file: str | None = None
    cache_dir: str | None = None
    output_dir: str = "results/longbench_qa"
    share_prefill: bool = True
    plan: str = "show"
    diagnostics: str | None = None


METHOD_OPTIONS = ("granularity", "evict_every", "evict_in_prefill", "score_queries", "positions")
"""Keys of `RunConfig` that are options of the methods that know them."""


def register_schema() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=RunConfig)
