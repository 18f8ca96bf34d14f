import json
from pathlib import Path

import pytest
import torch

from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.models import byte_tokenizer, load
from experiments.longbench_qa.schema import ModelConfig
from experiments.longbench_qa.shapes import SHAPES
from tests.tiny_models import tiny_model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model folder as the hub's are, with a fast tokenizer."""
    folder = tmp_path / "some-model"
    tiny_model("llama", vocab_size=259).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def config(path: Path, **changes) -> ModelConfig:
    return ModelConfig(name="m", kind="path", path=str(path), device="cpu", **changes)


def test_a_checkpoint_loads_and_is_described(checkpoint: Path):
    description = ModelWrapper(config(checkpoint)).load().description()
    assert description["dtype"] == "bfloat16"
    assert description["attention"] == "cab"
    assert description["max_length"] == 512
    assert description["chat_frame"] is None
    assert description["parameters"] > 1000
    eager = ModelWrapper(config(checkpoint, dtype="float32")).load("eager").description()
    assert (eager["dtype"], eager["attention"]) == ("float32", "eager_with_scores")


def test_pickled_weights_are_read_only_when_asked_for(checkpoint: Path):
    model = load(config(checkpoint)).model
    torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.path=.*some-model"):
        load(config(checkpoint))
    loaded = load(config(checkpoint, use_safetensors=False)).model
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_code_of_a_checkpoint_does_not_run_unless_asked_for(checkpoint: Path, tmp_path: Path):
    settings = json.loads((checkpoint / "config.json").read_text())
    settings |= {"model_type": "their_own", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (checkpoint / "config.json").write_text(json.dumps(settings))
    (checkpoint / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(config(checkpoint))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_model_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model\.path=.*cannot be loaded") as refused:
        load(config(tmp_path))
    assert "\n" not in str(refused.value)


def test_tiny_is_the_same_model_every_time():
    first, second = (load(ModelConfig(name="tiny", kind="tiny", device="cpu")).model for _ in range(2))
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert first.model.layers[0].self_attn.q_proj.weight.std() > 0.1


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_what_they_are_called(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    billions = {"qwen2.5-7b": 7.6, "llama-3.1-8b": 8.0, "mistral-7b": 7.2, "qwen3-8b": 8.2}[name]
    assert model.num_parameters() / 1e9 == pytest.approx(billions, abs=0.1)
