"""Every config composes into a cell, and every group's choices are what the library has."""

from dataclasses import fields
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import cab_attention
from experiments.longbench_qa.config import Cell, build_cell
from experiments.longbench_qa.data import DEMO_SETS, LONGBENCH, LONGBENCH_E
from experiments.longbench_qa.schema import METHOD_OPTIONS, RunConfig, register_schema

CONF = Path(__file__).resolve().parents[1] / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def cell(*overrides: str) -> Cell:
    return build_cell(composed(*overrides))


AXES = {
    "attention": "eager",
    "compress": "after_context",
    "first_token": "compressed",
    "truncate": "right",
    "chat_template": "always",
    "prefill_chunk": 64,
    "budget": 64,
    "granularity": "layer",
    "evict_every": 4,
    "score_queries": "last:8",
    "positions": "compacted",
}


@pytest.mark.parametrize("key", AXES)
def test_every_axis_is_in_the_identity_the_config_and_the_folder(key: str):
    default, other = cell(), cell(f"{key}={AXES[key]}")
    assert other.folder != default.folder
    in_method = key in ("budget", *METHOD_OPTIONS)
    for of, wanted in ((other, AXES[key]), (default, getattr(RunConfig, key, "cab"))):
        for record in (of.identity(), of.full_config()):
            assert (record["method"] if in_method else record)[key] == wanted
    changed = {name for name, value in default.identity().items() if value != other.identity()[name]}
    assert changed == {"method" if in_method else key}
    assert default.shares_prefill_with(other) == in_method


def test_the_file_says_the_defaults_of_the_schema():
    written = OmegaConf.load(CONF / "config.yaml")
    keys = {field.name for field in fields(RunConfig)} - {"model", "method", "dataset", "attention", "wandb"}
    for key in keys - {"max_samples"}:  # which the built-in data sets set
        assert written[key] == getattr(RunConfig, key)


@pytest.mark.parametrize("key", METHOD_OPTIONS)
@pytest.mark.parametrize("name", choices("method"))
def test_an_option_is_set_for_the_methods_that_take_it_and_refused_for_others(name: str, key: str):
    values = {"granularity": "layer", "evict_every": 3, "evict_in_prefill": "chunk", "score_queries": "last:5"}
    value = values.get(key, "compacted")
    overrides = (f"method={name}", f"{key}={value}", "prefill_chunk=64")
    default = cell(f"method={name}").method
    if name == "full" or getattr(default, key, None) == value:  # ignores it; is never otherwise
        assert cell(*overrides).method == default
    elif f"{key}: ${{{key}}}" in (CONF / "method" / f"{name}.yaml").read_text():
        assert getattr(cell(*overrides).method, key) == value
    else:
        with pytest.raises(ValueError, match=f"^{key}={value} has no meaning for {name}$"):
            cell(*overrides)


def test_the_default_needs_nothing():
    default = cell()
    assert (default.model.name, default.dataset.name, default.attention) == ("demo", "demo_qa", "cab")
    assert default.folder == Path("results/longbench_qa/demo/h2o/b128/demo_qa")


@pytest.mark.parametrize("group", ["dataset", "attention"])
def test_every_choice_composes(group: str):
    for name in choices(group):
        value = getattr(cell(f"{group}={name}"), group)
        assert (value if isinstance(value, str) else value.name) == name


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_composes(name: str):
    model = cell(f"model={name}", "model.path=org/some-model" if name == "path" else "seed=0").model
    assert model.name


@pytest.mark.parametrize("name", choices("experiment"))
def test_every_experiment_composes(name: str):
    config = composed(f"experiment={name}")
    assert build_cell(config)
    assert (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()[0] == "# @package _global_"
    assert f"experiment={name}" in (CONF / "experiment" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(("name", "samples"), [("demo", 60), ("demo_reference", 300)])
def test_a_demo_experiments_number_of_samples_comes_before_its_data_sets(name: str, samples: int):
    assert cell(f"experiment={name}").max_samples == samples
    assert cell(f"experiment={name}", "max_samples=6").max_samples == 6


def test_the_longbench_experiment_is_its_question_answering_part():
    register_schema()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=["experiment=longbench_qa"], return_hydra_config=True)
    wanted = {"narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique"}
    assert set(config.hydra.sweeper.params.dataset.split(",")) == wanted | {"dureader", "triviaqa"}


def test_no_chat_template_and_newline_stops_where_the_authors_have_none():
    cells = {name: cell(f"dataset={name}").dataset for name in LONGBENCH}
    bare = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, dataset in cells.items() if not dataset.chat_template} == bare
    assert {name for name, dataset in cells.items() if dataset.stop_at_newline} == {"samsum"}


def test_data_sets_are_those_known():
    assert choices("dataset") == sorted([*LONGBENCH, *LONGBENCH_E, *DEMO_SETS])


def test_methods_are_those_exported():
    exported = {
        value
        for value in vars(cab_attention).values()
        if isinstance(value, type) and issubclass(value, cab_attention.Method) and value is not cab_attention.Method
    }
    assert choices("method") == sorted(method.name for method in exported)


@pytest.mark.parametrize("name", choices("method"))
def test_a_methods_config_is_its_defaults(name: str):
    method = cell(f"method={name}", "budget=64").method
    assert method == type(method)(*([] if name == "full" else [64]))
    assert method.name == name


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["method=full", "budget=64"], "demo/full/bfull/demo_qa"),
        (["budget=0.25"], "demo/h2o/b0.25/demo_qa"),
        (["budget=1.0"], "demo/h2o/bfull/demo_qa"),
        (["method=snapkv", "method.window=16"], "demo/snapkv,window=16/b128/demo_qa"),
        (["method=random", "seed=3"], "demo/random,seed=3/b128/demo_qa"),
        (["attention=eager", "compress=after_context"], "demo/h2o/b128/demo_qa,attention=eager,compress=after_context"),
        (["model.dtype=bfloat16", "model.max_length=512"], "demo,dtype=bfloat16,max_length=512/h2o/b128/demo_qa"),
        (["max_samples=3", "wandb.mode=disabled", "data_dir=/x", "seed=3"], "demo/h2o/b128/demo_qa"),
        (["model=path", "model.path=org/some-model"], "some-model/h2o/b128/demo_qa"),
        (
            ["first_token=compressed", "truncate=left", "chat_template=never", "prefill_chunk=512"],
            "demo/h2o/b128/demo_qa,first_token=compressed,truncate=left,chat_template=never,prefill_chunk=512",
        ),
        (["dataset=trec", "prompts=official"], "demo/h2o/b128/trec"),
        (["dataset=trec", "prompts_file=/x/short.json"], "demo/h2o/b128/trec,prompts_file=short.json"),
        (["dataset=trec", "prompts_file=/x/a.json", "prompts=file"], "demo/h2o/b128/trec,prompts_file=a.json"),
        (["prompts_file=/x/short.json", "prompts=null"], "demo/h2o/b128/demo_qa"),  # it has prompts of its own
        (["granularity=layer"], "demo/h2o,granularity=layer/b128/demo_qa"),
        (["evict_every=8", "positions=compacted"], "demo/h2o,evict_every=8,positions=compacted/b128/demo_qa"),
        (["method=cab", "score_queries=every:4"], "demo/cab,score_queries=every:4/b128/demo_qa"),
        (
            ["evict_in_prefill=chunk", "prefill_chunk=64"],
            "demo/h2o,evict_in_prefill=chunk/b128/demo_qa,prefill_chunk=64",
        ),
        (
            # The full cache has no use for the options of methods that evict, nor for the chunks of one.
            ["method=full", "granularity=layer", "evict_every=8", "evict_in_prefill=chunk", "score_queries=last:8"],
            "demo/full/bfull/demo_qa",
        ),
    ],
)
def test_the_folder_names_what_differs_from_the_default(overrides: list[str], folder: str):
    assert cell(*overrides).folder == Path("results/longbench_qa") / folder


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("budget=0", "budget=0"),
        ("budget=-1", "budget=-1"),
        ("budget=1.5", "budget=1.5"),
        ("budget=abc", "budget='abc'"),
        ("compress=later", "after_context"),
        ("wandb.mode=on", "offline"),
        ("model.dtype=float77", "bfloat16"),
        ("model.kind=other", "tiny"),
        ("attention.name=sdpa", "eager"),
        ("method.recent=-1", "recent=-1"),
        ("method._target_=pathlib.Path", "eviction method"),
        ("dataset.max_new_tokens=0", "max_new_tokens=0"),
        ("model.max_length=1", "max_length"),
        ("first_token=half", "full, compressed"),
        ("truncate=both", "middle, left, right"),
        ("chat_template=true", "official, always, never"),
        ("prefill_chunk=0", "prefill_chunk=0"),
        ("prompts=own", "official, file, builtin"),
        ("prompts=file", "prompts=file is not for demo_qa"),
        ("dataset=trec prompts=file", "needs prompts_file"),
        ("dataset=trec prompts=builtin", "builtin is not for trec"),
        ("granularity=token", "granularity='token'"),
        ("evict_every=0", "evict_every=0"),
        ("score_queries=first:8", "score_queries='first:8'"),
        ("positions=new", "positions='new'"),
        ("evict_in_prefill=start", "evict_in_prefill='start'"),
        ("evict_in_prefill=chunk", "evict_in_prefill=chunk needs prefill_chunk"),
        ("method.evict_in_prefill=chunk", "evict_in_prefill=chunk needs prefill_chunk"),
        ("method=snapkv evict_every=8", "evict_every=8 has no meaning for snapkv"),
        ("method=snapkv evict_in_prefill=chunk prefill_chunk=8", "evict_in_prefill=chunk has no meaning for snapkv"),
        ("method=tova score_queries=last:8", "score_queries=last:8 has no meaning for tova"),
        ("method=random granularity=model", "granularity=model has no meaning for random"),
    ],
)
def test_a_wrong_value_is_refused_by_name(override: str, named: str):
    with pytest.raises(ValueError, match=r".") as refused:
        cell(*override.split())
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["bugdet=3", "method.recnt=3", "max_samples=x", "model.max_length=x"])
def test_a_typo_is_refused_by_hydra(override: str):
    from hydra.errors import ConfigCompositionException

    with pytest.raises(ConfigCompositionException):
        composed(override)
