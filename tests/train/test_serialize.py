"""A configuration survives the way to plain values and back; a wrong key or value ends in one line."""

import json
import subprocess
import sys
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from tokenyard.moe.config import Activation, AttentionConfig, AttentionKind, CapacityConfig, ModelConfig, MoEConfig
from tokenyard.parallel.config import Recompute
from tokenyard.train.config.compose import CONF, compose
from tokenyard.train.config.config import Config, ConfigError, OnFailure, Precision
from tokenyard.train.config.schema import REMOVED, settings
from tokenyard.train.config.serialize import config_from_plain, plain_config

PRESETS = sorted(path.stem for path in Path(CONF, "model").glob("*.yaml"))

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": {"lairs": 3}}, "model.lairs=3: there is no such setting in `model`; nearest valid: model.layers=3"),
    ({"stepz": "x"}, f"stepz=x: there is no such setting; nearest valid: steps={Config().steps}"),
    ({"model.layers": 3}, "model.layers=3: there is no such setting in `model`; nearest valid: model.layers=3"),
    ({"model": {"moe": 3}}, "model.moe=3: is a section, not a setting; nearest valid: model.moe.experts=8"),
    ({"model": None}, "model=null: is a section, not a setting; nearest valid: model.layers="),
    ({"model": {"activation": "swiglo"}}, "model.activation=swiglo: must be one of swiglu, geglu, "),
    ({"precision": 1}, "precision=1: must be one of auto, fp32, bf16, fp64; nearest valid: precision="),
    ({"steps": 2.6}, "steps=2.6: must be an integer; nearest valid: steps=3"),
    ({"steps": True}, "steps=true: must be an integer; nearest valid: steps=1150"),
    ({"steps": None}, "steps=null: must be an integer; nearest valid: steps=1150"),
    ({"steps": "many"}, "steps=many: must be an integer; nearest valid: steps=1150"),
    ({"optimizer": {"lr": "fast"}}, "optimizer.lr=fast: must be a number; nearest valid: optimizer.lr=0.005"),
    ({"optimizer": {"lr": 10**400}}, f"optimizer.lr=1{'0' * 59}...: must be a number; nearest valid: optimizer.lr=0.005"),
    ({"optimizer": {"clip_norm": []}}, "optimizer.clip_norm=[]: must be a number or null; nearest valid: optimizer.clip_norm=1.0"),
    ({"compile": 1}, "compile=1: must be true or false; nearest valid: compile="),
    ({"parallel": {"recompute": 1}}, "parallel.recompute=1: must be one of none, block, selective, offload; nearest valid: "),
    ({"tracker": {"names": "wandb"}}, "tracker.names=wandb: must be a list, [a,b]; nearest valid: tracker.names=[wandb]"),
    ({"tracker": {"names": [["a"]]}}, "tracker.names=[[a]]: must be a list, [a,b]; nearest valid: tracker.names=[wandb]"),
    ({"engine": {"extra": [1]}}, "engine.extra=[1]: must be a mapping, {key:value}; nearest valid: engine.extra={}"),
    ({"engine": {"extra": {3: 1}}}, "engine.extra={3:1}: must be a mapping"),
    ({"run": {"name": {"a": 1}}}, "run.name={a:1}: must be text or null; nearest valid: run.name=null"),
    ({"x" * 9999: [1] * 9999}, f"{'x' * 60}...=[1,1,"),
]


@pytest.mark.parametrize("preset", PRESETS)
def test_shipped_models_come_back(preset: str) -> None:
    config = compose([f"model={preset}"])
    back = config_from_plain(json.loads(json.dumps(plain_config(config))))
    assert back == config and repr(back) == repr(config)


def test_every_kind_of_value_comes_back() -> None:
    config = compose(
        ["precision=bf16", "tracker.names=[a,b]", "batch.micro=2", "optimizer.clip_norm=null", "checkpoint.on_failure=stop"]
    )
    config.engine.extra = {"a": {"b": [1, None, "x"]}}
    config.model.moe.capacity = CapacityConfig(schedule=[0.0, 1.0])
    config.model.attention = AttentionConfig(kind=AttentionKind.mla, window=3)
    plain = json.loads(json.dumps(plain_config(config)))
    back = config_from_plain(plain)
    assert back == config and (back.precision, back.checkpoint.on_failure) == (Precision.bf16, OnFailure["stop"])
    back.engine.extra["c"] = 1
    assert "c" not in plain["engine"]["extra"] and config_from_plain({}) == Config()
    model = ModelConfig(moe=MoEConfig(activation=Activation.geglu))
    assert config_from_plain({"model": plain_config(model)}).model == model


@pytest.mark.parametrize(("former", "today"), [(True, "block"), (False, "none"), ("true", "block"), ("selective", "selective")])
def test_values_of_earlier_versions(former: Any, today: str, tmp_path: Path) -> None:
    """In checkpoints and as overrides; a file of Hydra that has one is told what it is called now."""
    assert config_from_plain({"parallel": {"recompute": former}}).parallel.recompute is Recompute(today)
    assert compose([f"parallel.recompute={str(former).lower()}"]).parallel.recompute is Recompute(today)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text(f"# @package _global_\nparallel:\n  recompute: {former}\n")
    words = ["--config-dir", str(tmp_path), "experiment=own"]
    if isinstance(former, bool):
        with pytest.raises(
            ConfigError, match=f"must be one of none, block, selective, offload; nearest valid: parallel.recompute={today}"
        ):
            compose(words)
    elif former == today:
        assert compose(words).parallel.recompute is Recompute(today)


def test_numbers_and_texts_are_of_the_setting_s_kind() -> None:
    plain = {"steps": "3", "compile": "True", "run": {"name": 5}, "optimizer": {"lr": 1, "clip_norm": "1e-3"}}
    config = config_from_plain(plain)
    found = attrgetter("steps", "compile", "run.name", "optimizer.lr", "optimizer.clip_norm")(config)
    assert repr(found) == "(3, True, '5', 1.0, 0.001)"


@pytest.mark.parametrize(("plain", "says"), REFUSED)
def test_what_is_refused_is_one_line(plain: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_plain(plain)
    said = str(caught.value)
    assert said.startswith(says) and "; nearest valid: " in said and "\n" not in said and len(said) < 400


def test_overrides_are_checked_alike() -> None:
    plain = {"engine": {"extra": {"a": 1}}, "tracker": {"names": ["x"]}}
    config = config_from_plain(
        plain, ["engine.extra.b=2", "tracker.names=[y]", "optimizer.lr=1e-3", "data.path=null", "run.name=7"]
    )
    assert config.engine.extra == {"a": 1, "b": 2} and config.tracker.names == ["y"]
    assert (config.optimizer.lr, config.data.path, config.run.name) == (1e-3, None, "7")
    for override, says in (
        ("stepz=3", "stepz=3: there is no such setting; nearest valid: steps=3"),
        ("steps=x", "steps=x: must be an"),
        ("data=synthetic", "data=synthetic: must name one setting, .*; nearest valid: data.corpus=VALUE"),
        ("tracker.group=x", "tracker.group=x: there is no such setting any more, .*; nearest valid: WANDB_RUN_GROUP=x in the"),
    ):
        with pytest.raises(ConfigError, match=says):
            config_from_plain(plain, [override])


def test_a_setting_that_was_removed_is_skipped_in_what_an_earlier_version_wrote() -> None:
    assert set(REMOVED).isdisjoint(settings())
    plain = plain_config(Config())
    for key in REMOVED:
        section, _, name = key.partition(".")
        plain[section][name] = ["whatever"]
    assert config_from_plain(plain) == config_from_plain(plain, ["steps=1150"]) == Config()


def test_reading_needs_no_omegaconf() -> None:
    code = """
import sys
sys.modules["omegaconf"] = None
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.serialize import config_from_plain, plain_config
print(config_from_plain(plain_config(config_from_plain({"steps": 3}))).steps)
for plain in ({"stepz": 3}, {"steps": "x"}):
    try:
        config_from_plain(plain)
    except ConfigError as error:
        print(error)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    first, *refused = done.stdout.splitlines()
    assert first == "3" and [line.partition(": ")[0] for line in refused] == ["stepz=3", "steps=x"]
