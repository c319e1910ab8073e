"""The models of conf/model/ read without Hydra, which may not be there; tests/bench/test_gpu_models.py compares with it."""

import dataclasses
import typing
from enum import Enum
from typing import Any

from ...moe.config import ModelConfig
from ...train.config.compose import CONF
from .tell import Absent

FOLDER = CONF / "model"


def tiny_presets() -> list[str]:
    """By name."""
    return sorted(path.stem for path in FOLDER.glob("tiny*.yaml"))


def preset(name: str) -> ModelConfig:
    """Absent where there is no reader of YAML."""
    model = ModelConfig()
    _fill(model, _read(name))
    return model


def _read(name: str) -> dict[str, Any]:
    """What the file says, over what the files say that it is made from."""
    try:
        import yaml
    except ImportError as error:
        raise Absent("PyYAML is not installed, nor in .gpu/") from error
    own = yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) or {}
    plain: dict[str, Any] = {}
    for base in own.pop("defaults", []):
        if base != "_self_":
            _merge(plain, _read(base))
    return _merge(plain, own)


def _merge(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        if isinstance(value, dict):
            _merge(plain.setdefault(key, {}), value)
        else:
            plain[key] = value
    return plain


def _fill(target: Any, plain: dict[str, Any]) -> None:
    """The dataclass with these values; KeyError for a name that it does not have."""
    types = typing.get_type_hints(type(target))
    for key, value in plain.items():
        if dataclasses.is_dataclass(getattr(target, key)):
            _fill(getattr(target, key), value)
        else:
            setattr(target, key, _as(types[key], value))


def _as(kind: Any, value: Any) -> Any:
    """YAML knows no enums, and writes 1e-6 as a text."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    numbers = kind is float or float in typing.get_args(kind)
    return float(value) if numbers and value is not None and not isinstance(value, list) else value
