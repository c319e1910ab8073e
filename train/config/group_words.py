"""Options of groups as single settings, for a configuration that is not composed by Hydra: that of a checkpoint. No torch."""

import json
from typing import Any

from .compose import Arguments, check_arguments, compose_arguments
from .overrides import split_override
from .schema import written
from .serialize import leaves, plain_config


def spelled_out(arguments: Arguments) -> list[str]:
    """Returns the overrides with each group=option as the settings that it stands for, before those that name one setting.

    An option stands for all settings of its own section, and for those that it changes elsewhere. Raises ConfigError, one line.
    """
    groups = check_arguments(arguments)
    keys = {text: split_override(text)[0].lstrip("+~") for text in arguments.overrides}
    options = [text for text, key in keys.items() if key in groups]
    if not options:
        return arguments.overrides
    chosen, default = (composed_leaves(arguments, overrides) for overrides in (options, []))
    sections = {keys[text] for text in options}
    named = {key: value for key, value in chosen.items() if key.split(".")[0] in sections or value != default[key]}
    spelled = [f"{key}={json.dumps(value) if isinstance(value, str) else written(value)}" for key, value in named.items()]
    return [*spelled, *(text for text in arguments.overrides if text not in options)]


def composed_leaves(arguments: Arguments, overrides: list[str]) -> dict[str, Any]:
    """Returns each setting of the configuration of `arguments` with these overrides instead of its own, by dotted key."""
    return dict(leaves(plain_config(compose_arguments(Arguments(**{**vars(arguments), "overrides": overrides})))))
