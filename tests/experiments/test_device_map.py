"""A model whose layers lie on several devices of one process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.utils import is_accelerate_available

from cab_attention import EvictingCache, SharedPrefill
from cab_attention.attention import load_model_with_attention
from experiments.longbench_qa import memory
from experiments.longbench_qa.cell import run_cells
from experiments.longbench_qa.model_wrapper import ModelWrapper
from experiments.longbench_qa.models import DEMO_MODEL, load
from experiments.longbench_qa.schema import ModelConfig
from tests.all_methods import FULL_ATTENTION_VARIANTS, METHODS, VARIANTS
from tests.experiments.cells import demo_cell, recorded
from tests.tiny_models import random_ids, tiny_model

needs_accelerate = pytest.mark.skipif(not is_accelerate_available(), reason="needs accelerate")
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DEMO = ModelConfig(name="demo", kind="demo", device_map="auto")
MAKES = METHODS | VARIANTS | FULL_ATTENTION_VARIANTS


@needs_accelerate
def test_one_device_that_accelerate_chose(tmp_path: Path):
    """The same records as without; on a machine with a GPU it is that."""
    alone = demo_cell(tmp_path / "alone", model=replace(DEMO, device_map=None), max_samples=1)
    mapped = demo_cell(tmp_path / "mapped", model=DEMO, max_samples=1)
    for cell in (alone, mapped):
        run_cells([cell], ModelWrapper(cell.model))
    [one], [other] = recorded(alone), recorded(mapped)
    assert one["prediction"] == other["prediction"] and one["kept_by_layer"] == other["kept_by_layer"]


@needs_accelerate
def test_a_checkpoint_by_the_librarys_own_loading(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path)
    model = load_model_with_attention(str(tmp_path), "cab", device_map={"": "cpu"})
    cache = EvictingCache(model.config, METHODS["h2o"](9))
    model(random_ids(1, 30), past_key_values=cache)
    assert cache.layers[0].positions.shape[2] == 9


@needs_accelerate
def test_layers_outside_the_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = tiny_model("llama")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": "disk", "lm_head": "cpu"}
    monkeypatch.setattr("experiments.longbench_qa.models.load_model_with_attention", lambda *args, **options: model)
    with pytest.raises(ValueError, match="device_map=auto put layers on cpu and disk: the GPUs have too little memory"):
        load(DEMO)


def test_bytes_of_all_devices(monkeypatch: pytest.MonkeyPatch):
    """Sums over the GPUs of what each has, and of each one's peak."""
    held, peaks = {0: 100, 1: 30}, {0: 180, 1: 70}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held[device.index])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[device.index])
    done = []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: done.append((name, device.index)))
    meter = memory.MemoryMeter(torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1))
    assert meter.weights_bytes == 130
    held[1] = 45
    assert meter.held_beside(5) == 10
    started = meter.start()
    assert done == [(name, index) for index in (0, 1) for name in ("synchronize", "reset_peak_memory_stats")]
    assert meter.stop(started)[1] == 250 - 130


def test_devices_of_a_model_in_the_order_of_its_layers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2))
    assert memory.devices_of(model) == [torch.device("meta"), torch.device("cpu")]


@pytest.mark.gpu
@needs_two_gpus
@needs_accelerate
def test_every_method_on_two_gpus():
    """Each layer's cache is where the layer is; kept keys and answers are those of one GPU."""
    alone = load_model_with_attention(str(DEMO_MODEL), "cab", device="cuda:0", dtype="float32")
    spread = load_model_with_attention(str(DEMO_MODEL), "cab", device_map="balanced", dtype="float32")
    assert len(memory.devices_of(spread)) == 2
    ids = random_ids(1, 90).to("cuda:0")
    caches = {}
    for model in (alone, spread):
        mine = caches[model] = {name: EvictingCache(model.config, make(20)) for name, make in MAKES.items()}
        mine |= {
            f"{name} shared": EvictingCache(model.config, MAKES[name](20)) for name in ("h2o", "cab_model", "adakv")
        }
        together = [cache for name, cache in mine.items() if name.endswith(" shared")]
        with torch.inference_mode():
            model(ids[:, :80], past_key_values=SharedPrefill(together))
            for name, cache in mine.items():
                if not name.endswith(" shared"):
                    model(ids[:, :80], past_key_values=cache)
                for n in range(80, 90):
                    logits = model(ids[:, n : n + 1], past_key_values=cache).logits
                assert logits.isfinite().all()
    for name, cache in caches[alone].items():
        weights = [layer.self_attn.q_proj.weight.device for layer in spread.model.layers]
        for one, other, device in zip(cache.layers, caches[spread][name].layers, weights, strict=True):
            assert other.keys.device == other.positions.device == device, name
            assert torch.equal(one.positions.cpu(), other.positions.cpu()), name


@pytest.mark.gpu
@needs_two_gpus
@needs_accelerate
def test_the_study_on_two_gpus(tmp_path: Path):
    """Kept figures and the answer's share are one GPU's; the weights are counted once, over both."""
    shape = ModelConfig(name="random", kind="random", shape="qwen2.5-7b", device_map="auto", max_length=3000)
    wrapper = ModelWrapper(shape).load()
    assert len(memory.devices_of(wrapper.loaded.model)) == 2
    methods = [METHODS["h2o"](64), FULL_ATTENTION_VARIANTS["cab_model"](64), METHODS["adakv"](64)]
    text = "a b c d e " * 200
    alone = wrapper.generate(text, methods[1], max_new_tokens=4, answers=["c d"])
    for generation in [alone, *wrapper.generate_each(text, methods, max_new_tokens=4, answers=["c d"])]:
        assert not isinstance(generation, Exception), generation
        assert generation.kept_by_layer == [64.0] * 28
        assert len(generation.answer_kept_heads) == 28
        assert generation.weights_bytes > 15e9
