"""`tokenyard plan`: what a run needs, before a device is rented. `--dry-run` takes the step of one rank without its device."""

import json
import os
from argparse import Namespace
from typing import NamedTuple

from ..train.config.compose import parse_arguments
from ..train.config.config import Config, ConfigError, EngineKind, Precision
from ..train.config.environment import world_size
from ..train.config.model_summary import intended_ranks
from ..train.config.validate import check_rules
from ..train.rank_command import refuse
from ..train.weight_source import compose_run

OWN = ("rank", "world", "layers", "hot")
"""Words of the dry run alone; all others are overrides as for `tokenyard train`."""


class DryRunWords(NamedTuple):
    """What the words of a dry run ask for."""

    config: Config
    rank: int
    world: int


def plan_command(arguments: Namespace) -> int:
    """Prints what was asked for. Returns the exit code."""
    try:
        if not arguments.dry_run:
            from .search_command import search_command

            search_command(arguments)
            return 0
        folder = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
        asked = read_words([*arguments.words, *folder])
    except ConfigError as error:
        return refuse(error)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the fake process group warns of having no hooks
    from ..plan.dry_report import as_json, lines
    from ..plan.dry_run import step_facts

    found = step_facts(*asked)
    print(json.dumps(as_json(found, *asked)) if arguments.json else "\n".join(lines(found, *asked)))
    return 0


def read_words(words: list[str]) -> DryRunWords:
    """Returns the configuration, with the precision that it has on a GPU, and the rank. Raises ConfigError."""
    own = {key: value for key, equals, value in (word.partition("=") for word in words) if equals and key in OWN}
    config = compose_run(parse_arguments([word for word in words if word.partition("=")[0] not in OWN]))[0]
    world = whole_number("world", own["world"], 1) if "world" in own else intended_ranks(config, world_size())
    rank = whole_number("rank", own.get("rank", "0"), 0)
    if rank >= world:
        raise ConfigError.of("rank", rank, f"must be below world={world}", f"rank={world - 1}")
    if config.engine.kind is EngineKind.deepspeed:
        raise ConfigError.of("engine.kind", "deepspeed", "DeepSpeed has no dry run", "engine=torch")
    if config.precision is Precision.auto:
        config.precision = Precision.bf16
    check_rules(config, world)
    return DryRunWords(config, rank, world)


def whole_number(key: str, text: str, least: int) -> int:
    """Returns the number that `text` is. Raises ConfigError if it is none or below `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError.of(key, text, f"must be a whole number from {least} on", f"{key}={least}")
    return int(text)
