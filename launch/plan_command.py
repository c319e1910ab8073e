"""`tokenyard plan`: what a run needs, before a device is rented. `--dry-run` takes the step of one rank without its device."""

import json
import os
from argparse import Namespace
from typing import NamedTuple

from ..train.config.compose import parse_arguments
from ..train.config.config import Config, ConfigError, EngineKind, Precision
from ..train.config.environment import world_size
from ..train.config.model_summary import check_model_and_layout, intended_ranks
from ..train.rank_command import refuse
from ..train.weight_source import compose_run
from .words import split_words, whole_number

OWN = ("rank", "world", "layers", "hot")
"""Words of the dry run alone; all others are overrides as for `tokenyard train`."""


class DryRunWords(NamedTuple):
    """What the words of a dry run ask for."""

    config: Config
    rank: int
    world: int
    hot: float
    in_full: bool


def plan_command(arguments: Namespace) -> int:
    """Prints what was asked for. Returns the exit code."""
    try:
        if not arguments.dry_run:
            _plan(arguments)
            return 0
        folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
        asked = read_words([*arguments.words, *folder])
    except ConfigError as error:
        return refuse(error)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the fake process group warns of having no hooks
    from ..plan.dry_report import as_json, lines
    from ..plan.dry_run import step_facts

    found, place = step_facts(*asked), asked[:3]
    print(json.dumps(as_json(found, *place)) if arguments.json else "\n".join(lines(found, *place)))
    return 0


def _plan(arguments: Namespace) -> None:
    """Searches models for a budget, shows a calibration, or searches layouts of a cluster."""
    from .calibrate_command import calibrate_command
    from .loss_command import loss_command
    from .search_command import LOSS, search_command

    keys = {word.partition("=")[0] for word in arguments.words}
    if f"goal={LOSS}" in arguments.words:
        loss_command(arguments)
    elif "calibrate" in keys and "cluster" not in keys:
        calibrate_command(arguments)
    else:
        search_command(arguments)


def read_words(words: list[str]) -> DryRunWords:
    """Returns the configuration, with the precision that it has on a GPU, and the rank. Raises ConfigError."""
    own, overrides = split_words(words, OWN)
    config = compose_run(parse_arguments(overrides))[0]
    world = whole_number("world", own["world"], 1) if "world" in own else intended_ranks(config, world_size())
    rank = whole_number("rank", own.get("rank", "0"), 0)
    if rank >= world:
        raise ConfigError.of("rank", rank, f"must be below world={world}", f"rank={world - 1}")
    if config.engine.kind is EngineKind.deepspeed:
        raise ConfigError.of("engine.kind", "deepspeed", "DeepSpeed has no dry run", "engine=torch")
    if config.precision is Precision.auto:
        config.precision = Precision.bf16
    check_model_and_layout(config, world, "batch", "optimizer", "precision", "engine")
    if own.get("layers", "auto") not in ("auto", "all"):
        raise ConfigError.of("layers", own["layers"], "must be auto or all", "layers=auto")
    return DryRunWords(config, rank, world, _hot(own.get("hot", "1"), config.parallel.expert), own.get("layers") == "all")


def _hot(text: str, ranks: int) -> float:
    """Returns the load of a rank's experts over an even one. Raises ConfigError beyond all rows of the `ranks` ranks."""
    try:
        hot = float(text)
    except ValueError:
        hot = -1.0
    if not 0 < hot <= ranks:
        raise ConfigError.of("hot", text, f"must be in (0, parallel.expert={ranks}]", f"hot={ranks if hot > ranks else 1}")
    return hot
