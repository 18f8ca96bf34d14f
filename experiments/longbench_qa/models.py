"""Where models and tokenizers come from: the built-in ones, named shapes with random weights, or a checkpoint."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from cab_attention import load_model_with_attention
from experiments.longbench_qa.schema import ModelConfig
from experiments.longbench_qa.shapes import SHAPES, TINY

DEMO_MODEL = Path(__file__).parent / "demo" / "model"


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, its tokenizer, and what it is."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    revision: str | None  # commit of the checkpoint on the hub, if it came from there


def load(config: ModelConfig) -> LoadedModel:
    """Load what the config names, with attention `cab`. Raises ValueError for what cannot be found."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.kind == "demo":
        # The weights are stored in bfloat16; on a CPU float32 is twice as fast.
        return _from_checkpoint(replace(config, path=str(DEMO_MODEL), dtype=config.dtype or "float32"), device)
    if config.kind == "tiny":
        # Made on the CPU, whose random numbers are the same everywhere: one tiny model for all machines.
        model = _from_shape(TINY, config.dtype or "float32", "cpu", seed=0).to(device)
    elif config.kind == "random":
        assert config.shape is not None
        model = _from_shape(SHAPES[config.shape], config.dtype or "bfloat16", device, seed=0)
    else:
        return _from_checkpoint(config, device)
    return LoadedModel(model, byte_tokenizer(), revision=None)


def _from_shape(shape: dict[str, Any], dtype: str, device: str, seed: int) -> PreTrainedModel:
    config = AutoConfig.for_model(**shape)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="cab", dtype=getattr(torch, dtype))
    return model.eval()


def _from_checkpoint(config: ModelConfig, device: str) -> LoadedModel:
    assert config.path is not None
    try:
        source: dict[str, Any] = dict(revision=config.revision or "main", trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(config.path, **source)
        model = load_model_with_attention(
            config.path, "cab", device=device, dtype=config.dtype, use_safetensors=config.use_safetensors, **source
        )
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
