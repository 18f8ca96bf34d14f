"""Where models and tokenizers come from: the built-in ones, named shapes with random weights, or a checkpoint.

One device holds a model; or the GPUs of this process its layers (`device_map`); or the processes of torchrun, one GPU
each, a part of every layer (`tp_plan`: transformers' tensor parallelism).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from cab_attention import load_model_with_attention
from cab_attention.attention import require_accelerate
from cab_attention.tensor_parallel import check_heads_divide
from experiments.longbench_qa import ranks
from experiments.longbench_qa.schema import ModelConfig
from experiments.longbench_qa.shapes import SHAPES, TINY

DEMO_MODEL = Path(__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device or devices, its tokenizer, and what it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    revision: str | None  # commit of the checkpoint on the hub, if it came from there


def load(config: ModelConfig) -> LoadedModel:
    """Load what the config names, with attention `cab`. Raises ValueError for what cannot be found."""
    spread = _spread(config)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.kind == "demo":
        # The weights are stored in bfloat16; on a CPU float32 is twice as fast.
        demo = replace(config, path=str(DEMO_MODEL), dtype=config.dtype or "float32")
        return _from_checkpoint(demo, device, spread)
    if config.kind == "tiny":
        # Made on the CPU, whose random numbers are the same everywhere: one tiny model for all machines.
        model = _from_shape(TINY, config.dtype or "float32", "cpu", seed=0).to(device)
    elif config.kind == "random":
        assert config.shape is not None
        shape, dtype = SHAPES[config.shape], config.dtype or "bfloat16"
        model = _spread_shape(shape, dtype, spread, seed=0) if spread else _from_shape(shape, dtype, device, seed=0)
    else:
        return _from_checkpoint(config, device, spread)
    return LoadedModel(model, byte_tokenizer(), revision=None)


def _from_shape(shape: dict[str, Any], dtype: str, device: str, seed: int) -> PreTrainedModel:
    config = AutoConfig.for_model(**shape)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="cab", dtype=getattr(torch, dtype))
    return model.eval()


def _spread(config: ModelConfig) -> dict[str, Any]:
    """What has `from_pretrained` divide the model; nothing for a model on one device."""
    n_ranks = ranks.n_ranks()
    if config.tp_plan is None and n_ranks > 1:
        raise ValueError(f"torchrun started {n_ranks} processes: allowed with model.tp_plan=auto, which uses them")
    if config.tp_plan is not None and n_ranks == 1:
        raise ValueError(
            "model.tp_plan=auto divides the model among the processes of torchrun: allowed with "
            "torchrun --nproc-per-node N experiments/longbench_qa/runner.py ..., N at least 2"
        )
    if config.tp_plan is not None:
        require_accelerate(f"model.tp_plan={config.tp_plan}")
        return {"distributed_config": DistributedConfig(tp_plan=config.tp_plan, tp_size=n_ranks)}
    if config.device_map is not None:
        require_accelerate(f"model.device_map={config.device_map}")
        return {"device_map": config.device_map}
    return {}


def _spread_shape(shape: dict[str, Any], dtype: str, spread: dict[str, Any], seed: int) -> PreTrainedModel:
    """Weights are drawn where they lie: no device has to hold them all, and they are not those of one device."""
    config = AutoConfig.for_model(**shape)
    _check_heads(config, spread)
    with torch.random.fork_rng(), _quiet_transformers():  # it would list every weight as missing from the checkpoint
        torch.manual_seed(seed)
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict={}, attn_implementation="cab", dtype=getattr(torch, dtype), **spread
        )
    _refuse_offloading(model)
    _refuse_whole_attention(model)
    return model.eval()


def _check_heads(config: PreTrainedConfig, spread: dict[str, Any]) -> None:
    if "distributed_config" in spread:
        check_heads_divide(config.get_text_config(decoder=True), spread["distributed_config"].tp_size)


def _refuse_offloading(model: PreTrainedModel) -> None:
    outside = {"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if outside and torch.cuda.is_available():
        places = " and ".join(sorted(outside))
        raise ValueError(f"model.device_map=auto put layers on {places}: the GPUs have too little memory")


def _refuse_whole_attention(model: PreTrainedModel) -> None:
    """Each rank would hold the whole cache, and records would count it as often."""
    if ranks.n_ranks() > 1 and not any(
        name.endswith("k_proj") and style == "colwise" for name, style in model.tp_plan.items()
    ):
        raise ValueError(
            f"model.tp_plan=auto leaves the attention of {type(model).__name__} whole on every rank: "
            "allowed is a model whose plan divides its k_proj"
        )


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _from_checkpoint(config: ModelConfig, device: str, spread: dict[str, Any]) -> LoadedModel:
    assert config.path is not None
    try:
        source: dict[str, Any] = dict(revision=config.revision or "main", trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.path, **source)
        _check_heads(AutoConfig.from_pretrained(config.path, **source), spread)
        model = load_model_with_attention(
            config.path,
            "cab",
            device=None if spread else device,
            dtype=config.dtype,
            use_safetensors=config.use_safetensors,
            **source,
            **spread,
        )
        _refuse_offloading(model)
        _refuse_whole_attention(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # transformers explains itself over several lines
        raise ValueError(f"model.path={config.path}: cannot be loaded, from a folder or the hub: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"model.path={config.path}: needs a fast tokenizer (character offsets of tokens)")
    return LoadedModel(model, tokenizer, revision=getattr(model.config, "_commit_hash", None))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and three special tokens, for models without a vocabulary of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
