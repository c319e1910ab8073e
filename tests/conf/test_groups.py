"""Every option of every group composes to a valid configuration."""

from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from tokenyard.train.config.compose import CONF, compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.overrides import find_groups
from tokenyard.train.config.schema import written
from tokenyard.train.preflight import check_config

GROUPS = {
    "model",
    "parallel",
    "data",
    "tokenizer",
    "optimizer",
    "schedule",
    "checkpoint",
    "tracker",
    "engine",
    "launch",
    "experiment",
    "debug",
}
OPTIONS = [(group, option) for group, options in find_groups([CONF]).items() for option in options]
RANKS = {"parallel": 4}
"""Ranks of the groups whose options need more than their launch settings start."""


def test_the_groups_are_those_of_the_contract() -> None:
    assert set(find_groups([CONF])) == GROUPS


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option(group: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    wants_path = group == "data" and option in ("text", "parquet", "jsonl", "lines", "prepared")
    more = [f"data.path={tmp_path}"] if wants_path else ["data.name=someone/something"] if option == "hf" else []
    if option.startswith("tiny_"):
        more = ["tokenizer=bytes"]  # their vocabulary is too small for the default tokenizer
    if option == "huggingface":
        (tmp_path / "tokenizer.json").write_text("{}")
        more = [f"tokenizer.path={tmp_path}"]
    if option in ("slurm", "kubernetes"):
        more = ["run.dir=/shared/run", "launch.kubernetes.image=registry/name"]  # a cluster cannot guess these
    config = compose([f"{group}={option}", *more])
    if config.tokenizer.path is not None and config.tokenizer.path.count("/") == 1:  # one of the hub, which cannot be asked here
        (tmp_path / "tokenizer.json").write_text("{}")
        config.tokenizer.path = str(tmp_path)
    check_config(config, RANKS.get(group, config.launch.nodes * config.launch.ranks))


@pytest.mark.parametrize("experiment", ["capacity", "fine_grained"])
@pytest.mark.parametrize("debug", ["default", "overfit"])
def test_an_experiment_can_be_debugged(experiment: str, debug: str) -> None:
    check_config(compose([f"experiment={experiment}", f"debug={debug}"]), 1)


def test_debug_is_small_and_silent() -> None:
    config = compose(["debug=default"])
    assert (config.steps, config.model.layers, config.tracker.names, config.tokenizer.kind.name) == (5, 2, [], "bytes")


def test_debug_cpu_splits_in_every_way() -> None:
    config = compose(["debug=cpu"])
    assert (config.launch.ranks, config.parallel.tensor, config.parallel.expert) == (4, 2, 2)
    assert config.launch.ranks // config.parallel.tensor == 2


def test_a_choice_on_the_command_line_beats_an_experiment() -> None:
    config = compose(["debug=default", "model=default", "steps=7", "launch=torchrun", "tracker=wandb", "checkpoint.resume=never"])
    assert (config.model.layers, config.steps, config.launch.kind.name, config.tracker.names) == (
        Config().model.layers,
        7,
        "torchrun",
        ["wandb"],
    )


@pytest.mark.parametrize("group", sorted(GROUPS - {"experiment", "debug"}))
def test_files_say_nothing_that_is_the_default(group: str) -> None:
    section = attrgetter(group)(Config())
    files: list[Any] = [OmegaConf.to_container(OmegaConf.load(path)) for path in (CONF / group).glob("*.yaml")]
    # A file that begins with another one may have to set back what that one changed.
    own = [file for file in files if "defaults" not in (file or {})]
    assert [key for file in own for key, value in leaves(file) if value == written(attrgetter(key)(section))] == []


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The settings in `node` by dotted key, as text of an override."""
    for key, value in (node or {}).items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", written(value)
