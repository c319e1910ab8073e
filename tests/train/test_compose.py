"""Overrides compose to a typed Config; a wrong one ends in one line with key, value, rule and the nearest valid value."""

from pathlib import Path

import pytest
from hydra._internal import config_loader_impl
from omegaconf import OmegaConf
from tokenyard.data.config import Corpus
from tokenyard.moe.config import Scope
from tokenyard.train.config.compose import CONF, compose
from tokenyard.train.config.config import Config, ConfigError, EngineKind, Precision
from tokenyard.train.config.launch import Launcher
from tokenyard.train.config.overrides import find_groups
from tokenyard.train.config.schema import quoted
from tokenyard.train.config.serialize import plain_config

BAD = [
    # what was typed, what the message begins with, the nearest valid value
    ("optimizer.lrr=1", "optimizer.lrr=1:", "optimizer.lr=1"),
    ("lr=0.1", "lr=0.1:", "optimizer.lr=0.1"),
    ("stepz=3", "stepz=3:", "steps=3"),
    ("sequence_lenght=128", "sequence_lenght=128:", "sequence_length=128"),
    ("top_k=1", "top_k=1:", "model.moe.top_k=1"),
    ("model.moe.balance.scoop=batch", "model.moe.balance.scoop=batch:", "model.moe.balance.scope=batch"),
    ("model.moe.expert=4", "model.moe.expert=4:", "model.moe.experts=4"),
    ("parallel.experts=4", "parallel.experts=4:", "parallel.expert=4"),
    ("steps.x=1", "steps.x=1:", "steps=1"),
    ("+model.bar=1", "model.bar=1:", "model.layers=1"),
    ("++optimizer.lrr=1", "optimizer.lrr=1:", "optimizer.lr=1"),
    ("model={layrs: 3}", "model.layrs=3:", "model.layers=3"),
    ("modle=tiny", "modle=tiny:", "model=tiny"),
    ("modle=tny", "modle=tny:", "model=tiny"),
    ("model=tinny", "model=tinny:", "model=tiny"),
    ("launch=torchrum", "launch=torchrum:", "launch=torchrun"),
    ("experiment=fine", "experiment=fine:", "experiment=fine_grained"),
    ("debug=[default,cup]", "debug=cup:", "debug=cpu"),
    ("model=null", "model=null:", "model=tiny_null"),
    ("hydra/launcher=basicc", "hydra/launcher=basicc:", "hydra/launcher=basic"),
    ("precision=fp16", "precision=fp16:", "precision=bf16"),
    ("precision=FP32", "precision=FP32:", "precision=fp32"),
    ("device=gpu", "device=gpu:", "device=cpu"),
    ("engine.kind=torsh", "engine.kind=torsh:", "engine.kind=torch"),
    ("steps=1e3", "steps=1e3:", "steps=1000"),
    ("steps=many", "steps=many:", f"steps={Config().steps}"),
    ("steps=null", "steps=null:", f"steps={Config().steps}"),
    ("seed=2.2", "seed=2.2:", "seed=2"),
    ("optimizer.lr=abc", "optimizer.lr=abc:", f"optimizer.lr={Config().optimizer.lr}"),
    ("optimizer.lr=[1]", "optimizer.lr=[1]:", f"optimizer.lr={Config().optimizer.lr}"),
    ("compile=flase", "compile=flase:", "compile=false"),
    ("checkpoint.resume=null", "checkpoint.resume=null:", "checkpoint.resume=auto"),
    ("tracker.names=wandb", "tracker.names=wandb:", "tracker.names=[wandb]"),
    ("batch=8", "batch=8:", "batch.sequences=16"),
    ("model={moe: {top_k: x}}", "model.moe.top_k=x:", "model.moe.top_k=2"),
    ("steps=1,2", "steps=1,2:", "tokenyard train -m steps=1,2"),
    ("run.name=[", "run.name=[:", "run.name='['"),
    ("run.dir=a=b", "run.dir=a=b:", "run.dir='a=b'"),
    ("steps", "steps:", f"steps={Config().steps}"),
    ("~optimizer.lr", "~optimizer.lr:", "leave it out"),
    ("+steps=3", "+steps=3:", "steps=3"),
    ("+experiment=capacity", "+experiment=capacity:", "experiment=capacity"),
    ("model@other=tiny", "model@other=tiny:", "model=tiny"),
    ("steps=${nope}", "steps:", f"steps={Config().steps}"),
    ("steps=???", "steps:", f"steps={Config().steps}"),
    ("optimizer._target_=torch.optim.SGD", "optimizer._target_=torch.optim.SGD:", "optimizer=adamw"),
    ("+_target_=os.system", "+_target_=os.system:", "leave it out"),
    ("tracker.names=[{_target_: os.system}]", "tracker.names=[{_target_: os.system}]:", "tracker=jsonl"),
    ("hydra.sweeper._target_=os.system", "hydra.sweeper._target_=os.system:", "leave it out"),
    ("tracker.entity=us", "tracker.entity=us: there is no such setting any more, W&B", "WANDB_ENTITY=us in the environment"),
    ("tracker.group=x", "tracker.group=x: there is no such setting any more", "WANDB_RUN_GROUP=x in the environment"),
    ("+tracker.tags=[a,b]", "tracker.tags=[a,b]: there is no such setting any more", "WANDB_TAGS=a,b in the environment"),
    ("tracker.job_type=x", "tracker.job_type=x: there is no such setting any more", "WANDB_JOB_TYPE=x in the environment"),
    ("telemetry.probe_every=50", "telemetry.probe_every=50: there is no such setting any more, the probe", "evaluate.every=50"),
    ("log.layers_every=0", "log.layers_every=0: there is no such setting any more, the table", "evaluate.every=0"),
    ("--confg-dir=x", "--confg-dir=x:", "--config-dir"),
    ("--mutlirun", "--mutlirun:", "--multirun"),
]


@pytest.mark.parametrize(("typed", "begins", "nearest"), BAD, ids=[typed for typed, _, _ in BAD])
def test_bad_input(typed: str, begins: str, nearest: str) -> None:
    message = refused(typed)
    assert message.startswith(begins)
    assert message.endswith(f"; nearest valid: {nearest}")


@pytest.mark.parametrize("nearest", sorted({nearest for _, _, nearest in BAD if "=" in nearest and " " not in nearest}))
def test_the_nearest_valid_value_is_valid(nearest: str) -> None:
    compose([nearest])


BAD_FILES = [
    ("optimizer:\n  lrr: 1\n", "optimizer.lrr=", f"optimizer.lr={Config().optimizer.lr}"),
    ("optimizer:\n  lr: abc\n", "optimizer.lr=abc:", f"optimizer.lr={Config().optimizer.lr}"),
    ("precision: bf17\n", "precision=bf17:", "precision=bf16"),
    ("optimizer:\n  _target_: os.system\n", "optimizer._target_=", "optimizer=adamw"),
    ("tracker:\n  names: [{_target_: os.system}]\n", "tracker.names._target_=os.system:", "tracker=jsonl"),
    ("tracker:\n  group: mine\n", "tracker.group=", None),
    ("foo: 1\n", "foo=", None),
    ("steps: [1\n", "configuration:", None),
]


@pytest.mark.parametrize(("text", "begins", "nearest"), BAD_FILES)
def test_bad_file(text: str, begins: str, nearest: str | None, tmp_path: Path) -> None:
    message = refused("experiment=mine", "--config-dir", str(own_experiment(tmp_path, text)))
    assert message.startswith(begins)
    assert nearest is None or message.endswith(f"nearest valid: {nearest}")


def test_own_config_folder(tmp_path: Path) -> None:
    folder = own_experiment(tmp_path / "it's mine", "steps: 7\n")
    assert compose(["experiment=mine", "-cd", str(folder)]).steps == 7
    assert refused("experiment=mime", f"--config-dir={folder}").endswith("nearest valid: experiment=mine")
    assert refused(f"--config-dir={folder}/no").endswith(f"nearest valid: --config-dir={folder}")


def test_the_result_is_typed() -> None:
    config = compose(
        ["precision=bf16", "data=text", "model.moe.capacity.scope=rank", "launch=torchrun", "engine=torch", "run.dir=3"]
    )
    assert isinstance(config, Config)
    assert config.precision is Precision.bf16
    assert config.data.corpus is Corpus.text
    assert config.model.moe.capacity.scope is Scope.rank
    assert config.launch.kind is Launcher.torchrun
    assert config.engine.kind is EngineKind.torch
    assert config.run.dir == "3"


def test_without_overrides_it_is_the_dataclass() -> None:
    """Except for the settings of the default model's file."""
    expected = Config()
    expected.model.init_std = 0.06
    assert compose([]) == expected


@pytest.mark.parametrize("arguments", [["--local_rank", "1"], ["--local_rank=1"], ["--local-rank", "1"], ["--local-rank=1"]])
def test_launcher_arguments_are_left_out(arguments: list[str]) -> None:
    assert compose([*arguments, "steps=3"]) == compose(["steps=3", *arguments]) == compose(["steps=3"])


@pytest.mark.parametrize("text", ["a b", "it's", "a\\b", "a\\'b", "end\\", "a=b,c", "[1", "", "\\\\'", "ü{}", "x" * 200])
def test_quoted_text_is_read_back(text: str) -> None:
    assert compose([f"run.name={quoted(text)}"]).run.name == text


def test_composing_twice_does_not_remember() -> None:
    compose(["steps=3", "model=tiny"])
    assert compose([]).steps == Config().steps
    assert compose([]).model.layers == Config().model.layers


def test_what_the_tests_remember_of_hydra_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tests/composed_once.py: an option of each group, values on top, and all once more."""
    words = [[f"{group}={options[-1]}"] for group, options in find_groups([CONF]).items()]
    words += [[*words[-1], "steps=7"], ["model=tiny", "model.layers=3"], ["model=tiny"], ["debug=[default,cpu]"], []]
    remembered = [plain_config(compose(one)) for one in [*words, *words]]
    compose(["model=tiny"]).model.layers = 99
    assert plain_config(compose(["model=tiny"])) in remembered
    merge = config_loader_impl.ConfigLoaderImpl._compose_config_from_defaults_list
    monkeypatch.setattr(config_loader_impl, "create_defaults_list", config_loader_impl.create_defaults_list.__wrapped__)
    monkeypatch.setattr(config_loader_impl.ConfigLoaderImpl, "_compose_config_from_defaults_list", merge.__wrapped__)
    expected = [plain_config(compose(one)) for one in words]
    assert remembered == [*expected, *expected]


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose(list(argv))
    message = str(error.value)
    assert "\n" not in message
    return message


def own_experiment(folder: Path, text: str) -> Path:
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    return folder


@pytest.mark.parametrize("words", [[], ["model=tiny_deepseek_v3"], ["launch=slurm", "launch.slurm.lines=['--a','--b']"]])
def test_plain_values_are_those_that_the_schema_gives(words: list[str]) -> None:
    config = compose(words)
    assert repr(plain_config(config)) == repr(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
