"""A ModelConfig as plain JSON, as the facts of a checkpoint hold it, and back. No library: enumerations are their names."""

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from ..checkpoint.bounded import brief
from ..moe.config import ModelConfig


def plain_model(config: ModelConfig) -> dict[str, Any]:
    """Nested mappings of numbers, strings and lists."""
    return {field.name: _plain(getattr(config, field.name)) for field in fields(config)}


def model_from_plain(plain: dict[str, Any]) -> ModelConfig:
    """What `plain_model` gave; settings that it leaves out have their defaults. ValueError for what there is no setting for."""
    config = ModelConfig()
    _fill(config, plain, "model")
    return config


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value.name if isinstance(value, Enum) else value


def _fill(config: Any, plain: Any, key: str) -> None:
    if not isinstance(plain, dict):
        raise ValueError(f"{key}={brief(plain)}: the checkpoint's configuration must have settings here")
    for name, value in plain.items():
        if name not in {field.name for field in fields(config)}:
            raise ValueError(
                f"{key}.{brief(name)[1:-1]}={brief(value)}: there is no such setting, the checkpoint is of another version"
            )
        present = getattr(config, name)
        if is_dataclass(present):
            _fill(present, value, f"{key}.{name}")
        elif isinstance(present, Enum):
            if not isinstance(value, str) or value not in type(present).__members__:
                raise ValueError(f"{key}.{name}={brief(value)}: must be one of {', '.join(type(present).__members__)}")
            setattr(config, name, type(present)[value])
        elif not _same_kind(value, present):
            raise ValueError(f"{key}.{name}={brief(value)}: is of another kind than {present!r}")
        else:
            setattr(config, name, value)


def _same_kind(value: Any, present: Any) -> bool:
    """Whether `value` may stand where `present` does by default. Null is a number that is not set."""
    if isinstance(present, bool):
        return isinstance(value, bool)
    if present is None or isinstance(present, int | float):
        return value is None or type(value) is int or (type(value) is float and not isinstance(present, int))
    return isinstance(value, type(present))
