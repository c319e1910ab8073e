"""What a run may change when it goes on from a checkpoint, and what would make another run of it. No torch."""

from pathlib import Path
from typing import Any

from ..config.config import Config, ConfigError
from ..config.serialize import config_from_plain, leaves, shown_config

QUIET = ("run.", "launch.", "log.", "sample.", "checkpoint.resume")
"""Beginnings of settings that say nothing about the training."""


def refuse_another_run(config: Config, facts: dict[str, Any], path: Path) -> None:
    """ConfigError, naming the setting, for another model or order of the data than the checkpoint `path` was made with."""
    saved = config_from_plain(facts["config"])
    same = {
        "model": (saved.model, config.model),
        "sequence_length": (saved.sequence_length, config.sequence_length),
        "batch.sequences": (saved.batch.sequences, config.batch.sequences),
        "seed": (saved.seed, config.seed),
    }
    refuse_difference(same, path)


def refuse_difference(same: dict[str, tuple[Any, Any]], path: Path) -> None:
    """ConfigError for the first key whose value in the checkpoint is not the one now."""
    for key, (before, now) in same.items():
        if before != now:
            key, before, now = first_difference(key, before, now)
            raise ConfigError(
                f"{key}={now}: the checkpoint {path} was made with {before}; nearest valid: {key}={before} or a new run.dir"
            )


def first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Down to the setting that differs."""
    if hasattr(before, "__dataclass_fields__"):
        for name in before.__dataclass_fields__:
            if getattr(before, name) != getattr(now, name):
                return first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return key, getattr(before, "value", before), getattr(now, "value", now)


def changes(facts: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Settings that are others than in the checkpoint, by key: before and now."""
    before, now = (dict(leaves(plain)) for plain in (shown_config(config_from_plain(facts["config"])), shown_config(config)))
    return {key: (before[key], now[key]) for key in now if before[key] != now[key] and not key.startswith(QUIET)}
