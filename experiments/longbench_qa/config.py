"""What a user may configure, checked before anything is loaded, and the cell that it describes."""

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.utils import instantiate
from omegaconf import MISSING, DictConfig, OmegaConf

from cab_attention import Budget, Full, Method
from experiments.longbench_qa.shapes import SHAPES

ATTENTIONS = ("cab", "eager")
COMPRESS = ("after_prompt", "after_context")
MODEL_KINDS = ("demo", "tiny", "random", "path")
DTYPES = ("float32", "bfloat16", "float16")
WANDB_MODES = ("offline", "online", "disabled")


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


@dataclass
class DatasetConfig:
    """A data set: its name is its file's stem; generation length in tokens."""

    name: str = MISSING
    max_new_tokens: int = MISSING
    chat_template: bool = True
    stop_at_newline: bool = False


@dataclass
class AttentionConfig:
    """`cab`, or `eager` (the model's own eager attention: the independent check)."""

    name: str = "cab"


@dataclass
class WandbConfig:
    """One Weights & Biases run a cell."""

    mode: str = "offline"
    project: str = "cab-attention"
    group: str | None = None


@dataclass
class RunConfig:
    """The schema of conf/config.yaml: typos and wrong types are refused before anything loads."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=dict)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    budget: Any = 128
    compress: str = "after_prompt"
    max_samples: int | None = None
    seed: int = 0
    data_dir: str | None = None
    prompts: str | None = None
    prompts_file: str | None = None
    cache_dir: str | None = None
    output_dir: str = "results/longbench_qa"
    share_prefill: bool = True


def register_schema() -> None:
    """Make the schema known to Hydra under the name that conf/config.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


@dataclass(frozen=True)
class Cell:
    """One cell of the study: model x method x budget x data set, and the axes beside."""

    model: ModelConfig
    method: Method
    dataset: DatasetConfig
    attention: str
    compress: str
    seed: int
    max_samples: int | None
    data_dir: str | None
    prompts: str | None
    prompts_file: str | None
    cache_dir: str | None
    output_dir: str
    wandb: WandbConfig
    share_prefill: bool = True

    @property
    def folder(self) -> Path:
        """Where the cell's records lie: MODEL/METHOD/bBUDGET/DATASET, with whatever differs from its default."""
        model = _named(str(self.model.name), dtype=self.model.dtype, max_length=self.model.max_length)
        method = _named(self.method.name, **_changed_options(self.method))
        axes = {
            "attention": self.attention if self.attention != "cab" else None,
            "compress": self.compress if self.compress != "after_prompt" else None,
        }
        budget = f"b{self.method.parsed_budget}"
        return Path(self.output_dir) / model / method / budget / _named(self.dataset.name, **axes)

    def shares_prefill_with(self, other: "Cell") -> bool:
        """The two differ in their method and its budget at most."""
        return replace(self, method=other.method) == other

    def identity(self) -> dict[str, Any]:
        """What makes a sample's record what it is; equal for two runs that may share a folder."""
        return {
            "model": {key: value for key, value in asdict(self.model).items() if key != "device"},
            "method": {"name": self.method.name, **asdict(self.method)},
            "dataset": asdict(self.dataset),
            "attention": self.attention,
            "compress": self.compress,
        }

    def full_config(self) -> dict[str, Any]:
        """Everything that was configured, for the record."""
        return asdict(self) | {"method": {"name": self.method.name, **asdict(self.method)}}


def build_cell(config: DictConfig) -> Cell:
    """The cell that a composed config describes. Raises ValueError, one line, for a value that is not allowed."""
    run = OmegaConf.to_object(config)
    assert isinstance(run, RunConfig)
    for key, value, allowed in (
        ("model.kind", run.model.kind, MODEL_KINDS),
        ("attention", run.attention.name, ATTENTIONS),
        ("compress", run.compress, COMPRESS),
        ("wandb.mode", run.wandb.mode, WANDB_MODES),
    ):
        if value not in allowed:
            raise ValueError(f"{key}={value!r}, allowed is one of {', '.join(allowed)}")
    for key, number, least in (
        ("dataset.max_new_tokens", run.dataset.max_new_tokens, 1),
        ("max_samples", run.max_samples, 1),
        ("model.max_length", run.model.max_length, 2),
    ):
        if number is not None and number < least:
            raise ValueError(f"{key}={number}, allowed is an integer >= {least}")
    _check_model(run.model)
    Budget.parse(run.budget)
    return Cell(
        model=run.model,
        method=build_method(run.method),
        dataset=run.dataset,
        attention=run.attention.name,
        compress=run.compress,
        seed=run.seed,
        max_samples=run.max_samples,
        data_dir=run.data_dir,
        prompts=run.prompts,
        prompts_file=run.prompts_file,
        cache_dir=run.cache_dir,
        output_dir=run.output_dir,
        wandb=run.wandb,
        share_prefill=run.share_prefill,
    )


def _check_model(model: ModelConfig) -> None:
    if model.dtype is not None and model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={model.dtype!r}, allowed is one of {', '.join(DTYPES)}")
    if model.kind == "random" and model.shape not in SHAPES:
        raise ValueError(f"model.shape={model.shape!r}, allowed is one of {', '.join(SHAPES)}")
    if model.kind == "path":
        if not model.path:
            raise ValueError("model=path needs model.path=FOLDER_OR_HUB_ID")
        if model.path.startswith(("/", ".", "~")) and not (Path(model.path) / "config.json").is_file():
            raise ValueError(f"model.path={model.path} is not a folder with a model (no config.json)")
        model.name = model.name or Path(model.path).name
    if not model.name:
        raise ValueError("model.name is missing: it names the model in folders and tables")


def build_method(options: dict[str, Any]) -> Method:
    """Instantiate a method from its `_target_` and options. Raises ValueError for what it does not accept."""
    try:
        method = instantiate(options)
    except Exception as error:  # Hydra wraps the method's own refusal in an error of its own
        raise ValueError(str(error.__cause__ or error)) from error
    if not isinstance(method, Method):
        raise ValueError(f"method._target_={options.get('_target_')!r} is not an eviction method")
    return method


def _changed_options(method: Method) -> dict[str, Any]:
    if isinstance(method, Full):
        return {}
    options = {option.name: option.default for option in fields(method) if option.name != "budget"}
    values = {name: getattr(method, name) for name in options}
    return {name: value for name, value in values.items() if value != options[name]}


def _named(name: str, **parts: Any) -> str:
    """`name,key=value,...` of the parts that are set, as a folder name."""
    text = ",".join([name, *(f"{key}={value}" for key, value in parts.items() if value is not None)])
    return text.replace("/", "_")
