"""Tiny models trained for three steps on the device in fp32 and bf16, against fp64 on the CPU with the same choices of experts."""

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from ...moe.config import ModelConfig
from ...parity.compare import assembled
from ...parity.finding import KINDS, Key
from ...parity.observe import ObservedTensor, observe
from ...train.config.compose import CONF
from ...train.config.config import BatchConfig, Config, OptimizerConfig, Precision
from .choices import ChoiceLog, again, kept
from .recorder import Recorder, Unavailable
from .row_error import worst_matrix, worst_row

STEPS = 3
LIMITS = {
    Precision.fp32: {"outputs": 2e-5, "losses": 1e-5, "norm": 1e-5, "gradients": 1e-4, "weights": 1e-3, "counts": 0.0},
    Precision.bf16: {"outputs": 1.5e-1, "losses": 3e-2, "norm": 5e-2, "gradients": 3e-1, "weights": 2e-1, "counts": 0.0},
}
"""Of the worst row (row_error.py) of any tensor of a column of parity's table."""
OTHER = {Precision.fp32: (1e-3, 1e-3), Precision.bf16: (0.2, 0.5)}
"""Share of choices that rounding may make otherwise, and by how much of their deviation scores may differ there."""
FLOORS = {"gradients": 1e-3, "weights": 1e-2}
"""A tensor whose norm is below this share of the largest of its kind is measured by that share: it may be rounding."""


class Apart(NamedTuple):
    """The tensor of a column that is furthest from the reference."""

    value: float
    key: Key


def run(recorder: Recorder) -> None:
    """Every tiny model of conf/model/, first those whose attention is torch's own: the others may have to be compiled."""
    models = {name: small(preset(name)) for name in tiny_presets()}
    for name, model in sorted(models.items(), key=lambda item: masked(item[1])):
        compare(recorder, name, model)


def masked(model: ModelConfig) -> bool:
    """Whether attention has more than a causal mask: a window, sinks or a soft cap."""
    attention = model.attention
    return attention.window is not None or attention.sinks or attention.softcap is not None


def compare(recorder: Recorder, name: str, model: ModelConfig) -> None:
    """A line for each precision and column."""
    choices = ChoiceLog()
    with kept(choices):
        reference = assembled(observe(configured(model, Precision.fp64), STEPS))
    for precision, limits in LIMITS.items():
        own = ChoiceLog(choices.made)
        with again(own):
            found = assembled(_on_host(observe(configured(model, precision), STEPS, device=recorder.device)))
        for column, (value, key) in furthest(found, reference).items():
            where = f"step {key.step}, {key.kind} {key.name}".strip()
            recorder.below(f"{name}, {precision.value}, {column}", value, limits[column], where)
        share, gap = OTHER[precision]
        text = f"{own.other} of {own.compared} choices, by {own.gap:.1e} of the scores' deviation"
        recorder.check(f"{name}, {precision.value}, choices", own.share <= share and own.gap <= gap, text)


def configured(model: ModelConfig, precision: Precision) -> Config:
    """A global batch of 4 x 16 tokens."""
    optimizer = OptimizerConfig(lr=1e-3)
    return Config(seed=1, sequence_length=16, precision=precision, batch=BatchConfig(4), model=model, optimizer=optimizer)


def small(model: ModelConfig) -> ModelConfig:
    """A vocabulary that costs no time."""
    return replace(model, vocabulary=min(model.vocabulary, 512))


def furthest(found: dict[Key, Tensor], reference: dict[Key, Tensor]) -> dict[str, Apart]:
    """By column of parity's table."""
    largest: dict[str, float] = {}
    for key, tensor in reference.items():
        largest[key.kind] = max(largest.get(key.kind, 0.0), float(tensor.double().norm()))
    farthest: dict[str, Apart] = {}
    for key, expected in reference.items():
        column = KINDS[key.kind]
        measure = worst_matrix if column in ("gradients", "weights") else worst_row
        apart = Apart(measure(found[key], expected, FLOORS.get(column, 0.0) * largest[key.kind]), key)
        farthest[column] = max(farthest.get(column, apart), apart)
    return farthest


def _on_host(seen: Iterable[ObservedTensor]) -> Iterable[ObservedTensor]:
    return (one._replace(tensor=one.tensor.cpu()) for one in seen)


# The models of conf/model/, read without Hydra.

FOLDER = CONF / "model"


def tiny_presets() -> list[str]:
    """By name."""
    return sorted(path.stem for path in FOLDER.glob("tiny*.yaml"))


def preset(name: str) -> ModelConfig:
    """Unavailable where there is no reader of YAML."""
    model = ModelConfig()
    _fill(model, _read(name))
    return model


def _read(name: str) -> dict[str, Any]:
    """What the file says, over what the files say that it is made from."""
    try:
        import yaml
    except ImportError as error:
        raise Unavailable("PyYAML is not installed, nor in .gpu/") from error
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
