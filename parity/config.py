"""The settings of `tokenyard parity`, in addition to those of a run. Imports only the standard library."""

import dataclasses
from dataclasses import dataclass

from ..train.config.config import ConfigError
from ..train.config.schema import nearest_key, written

TOLERANCE = 1e-9
"""The largest relative difference in fp64 that is accepted as rounding."""


@dataclass
class ParityConfig:
    layouts: str = "auto"
    """auto: all that are legal on 1, 2, 4, ... ranks; or a list as [tensor=2 expert=2, shard=4 recompute, replicate=2]."""
    ranks: int = 4
    """The most ranks that layouts=auto takes: a power of two."""
    steps: int = 3
    """Optimizer steps that are compared."""
    shrink: bool = True
    """Make the model small first, with all its features; false compares the model as it is."""


def split_settings(words: list[str]) -> tuple[ParityConfig, list[str]]:
    """Returns the parity.* settings among `words`, and the other words.

    Raises ConfigError for an unknown setting or invalid value.
    """
    config, others = ParityConfig(), []
    for word in words:
        if word.startswith("parity."):
            key, _, value = word.partition("=")
            _set(config, key, value.strip())
        else:
            others.append(word)
    return config, others


def _set(config: ParityConfig, key: str, text: str) -> None:
    names = {f"parity.{field.name}": field.name for field in dataclasses.fields(config)}
    if key not in names:
        nearest = nearest_key(key, names)
        raise ConfigError.of(key, text, "there is no such setting in `parity`", f"{nearest}={_default(names[nearest])}")
    name = names[key]
    if name == "layouts":
        config.layouts = text
    elif name == "shrink":
        if text.lower() not in ("true", "false"):
            raise ConfigError.of(key, text, "must be true or false", f"{key}=true")
        config.shrink = text.lower() == "true"
    else:
        number = int(text) if text.isdecimal() else 0
        if number < 1 or (name == "ranks" and number & (number - 1)):
            rule = "must be a power of two" if name == "ranks" else "must be an integer from 1 on"
            raise ConfigError.of(key, text, rule, f"{key}={1 << (number.bit_length() - 1) if number else _default(name)}")
        setattr(config, name, number)


def _default(name: str) -> str:
    return written(getattr(ParityConfig(), name))
