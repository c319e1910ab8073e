"""Trains tiny models for three steps on the device, in fp32 and bf16, and compares with fp64 on the CPU and the same choices."""

import dataclasses
import typing
from dataclasses import replace
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from ...moe.config import ModelConfig
from ...parity.compare import assemble
from ...parity.finding import KINDS, Key
from ...parity.observe import observe
from ...train.config.compose import CONF
from ...train.config.config import BatchConfig, Config, OptimizerConfig, Precision
from .choices import ChoiceLog, record_choices, replay_choices
from .recorder import Recorder, Unavailable
from .row_error import worst_matrix, worst_row

STEPS = 3
LIMITS = {
    Precision.fp32: {"outputs": 2e-5, "losses": 1e-5, "norm": 1e-5, "gradients": 1e-4, "weights": 1e-3, "counts": 0.0},
    Precision.bf16: {"outputs": 1.5e-1, "losses": 3e-2, "norm": 5e-2, "gradients": 3e-1, "weights": 2e-1, "counts": 0.0},
}
"""Limits of the worst row (row_error.py) of any tensor in a column of parity's table."""
OTHER = {Precision.fp32: (1e-3, 1e-3), Precision.bf16: (0.2, 0.5)}
"""Limits of the share of choices that rounding changes, and of the difference of their scores, relative to the deviation.

With groups of experts the latter has none: two groups may tie while the scores of their experts do not.
"""
FLOORS = {"gradients": 1e-3, "weights": 1e-2}
"""A tensor whose norm is below this share of the largest of its kind is measured relative to that share: it may be rounding."""


class Apart(NamedTuple):
    """The tensor of a column with the largest error."""

    value: float
    key: Key


def run(recorder: Recorder) -> None:
    """Compares every tiny model of conf/model/, first those with torch's own attention, since the others may have to be
    compiled."""
    models = {name: small(preset(name)) for name in tiny_presets()}
    for name, model in sorted(models.items(), key=lambda item: masked(item[1])):
        compare(recorder, name, model)


def masked(model: ModelConfig) -> bool:
    """Whether attention has more than a causal mask: a window, sinks or a soft cap."""
    attention = model.attention
    return attention.window is not None or attention.sinks or attention.softcap is not None


def compare(recorder: Recorder, name: str, model: ModelConfig) -> None:
    """Checks each precision and column."""
    choices = ChoiceLog()
    with record_choices(choices):
        reference = assemble(observe(configured(model, Precision.fp64), STEPS))
    for precision, limits in LIMITS.items():
        own = ChoiceLog(choices.made)
        with replay_choices(own):
            seen = observe(configured(model, precision), STEPS, device=recorder.device)
            found = assemble(one._replace(tensor=one.tensor.cpu()) for one in seen)
        for column, (value, key) in furthest(found, reference).items():
            where = f"step {key.step}, {key.kind} {key.name}".strip()
            recorder.below(f"{name}, {precision.value}, {column}", value, limits[column], where)
        share, gap = OTHER[precision]
        text = f"{own.different} of {own.compared} choices, by {own.gap:.1e} of the scores' deviation"
        near = own.gap <= gap or model.moe.router.groups > 1
        recorder.check(f"{name}, {precision.value}, choices", own.share <= share and near, text)


def configured(model: ModelConfig, precision: Precision) -> Config:
    """A global batch of 4 x 16 tokens."""
    optimizer = OptimizerConfig(lr=1e-3)
    return Config(seed=1, sequence_length=16, precision=precision, batch=BatchConfig(4), model=model, optimizer=optimizer)


def small(model: ModelConfig) -> ModelConfig:
    """The model with a small vocabulary."""
    return replace(model, vocabulary=min(model.vocabulary, 512))


def furthest(found: dict[Key, Tensor], reference: dict[Key, Tensor]) -> dict[str, Apart]:
    """The tensor with the largest error in each column of parity's table."""
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


# Reads the models of conf/model/ without Hydra, which may not be installed; tests/bench/test_gpu_checks.py compares both.

FOLDER = CONF / "model"


def tiny_presets() -> list[str]:
    """The names of the tiny models."""
    return sorted(path.stem for path in FOLDER.glob("tiny*.yaml"))


def preset(name: str) -> ModelConfig:
    """The model of this name. Raises Unavailable without PyYAML."""
    model = ModelConfig()
    _fill(model, _read(name))
    return model


def _read(name: str) -> dict[str, Any]:
    """The values of the file, merged over those of its defaults."""
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
    """Set the fields of the dataclass. Raises KeyError for an unknown name."""
    types = typing.get_type_hints(type(target))
    for key, value in plain.items():
        if dataclasses.is_dataclass(getattr(target, key)):
            _fill(getattr(target, key), value)
        else:
            setattr(target, key, _as(types[key], value))


def _as(kind: Any, value: Any) -> Any:
    """Converts a YAML value: YAML has no enums and reads 1e-6 as a string."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    numbers = kind is float or float in typing.get_args(kind)
    return float(value) if numbers and value is not None and not isinstance(value, list) else value
