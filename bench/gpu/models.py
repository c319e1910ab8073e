"""Tiny models trained for three steps on the device in fp32 and bf16, against fp64 on the CPU with the same choices of experts."""

import dataclasses
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ...moe.config import ModelConfig
from ...parity.compare import assembled
from ...parity.finding import KINDS, Key
from ...parity.observe import ObservedTensor, observe
from ...train.config.config import BatchConfig, Config, OptimizerConfig, Precision
from .choices import ChoiceLog, again, kept
from .presets import preset, tiny_presets
from .router_cases import ROUTERS
from .sameness import worst_matrix, worst_row
from .tell import Teller

STEPS = 3
LIMITS = {
    Precision.fp32: {"outputs": 2e-5, "losses": 1e-5, "norm": 1e-5, "gradients": 1e-4, "weights": 1e-3, "counts": 0.0},
    Precision.bf16: {"outputs": 1.5e-1, "losses": 3e-2, "norm": 5e-2, "gradients": 3e-1, "weights": 2e-1, "counts": 0.0},
}
"""Of the worst row (sameness.py) of any tensor of a column of parity's table."""
OTHER = {Precision.fp32: (1e-3, 1e-3), Precision.bf16: (0.2, 0.5)}
"""Share of choices that rounding may make otherwise, and by how much of their deviation scores may differ there."""
FLOORS = {"gradients": 1e-3, "weights": 1e-2}
"""A tensor whose norm is below this share of the largest of its kind is measured by that share: it may be rounding."""


class Apart(NamedTuple):
    """The tensor of a column that is furthest from the reference."""

    value: float
    key: Key


def run(teller: Teller) -> None:
    """Every tiny model of conf/model/, first those whose attention is torch's own: the others may have to be compiled."""
    models = {name: small(preset(name)) for name in tiny_presets()}
    for name, model in sorted(models.items(), key=lambda item: masked(item[1])):
        compare(teller, name, model)


def masked(model: ModelConfig) -> bool:
    """Whether attention has more than a causal mask: a window, sinks or a soft cap."""
    attention = model.attention
    return attention.window is not None or attention.sinks or attention.softcap is not None


def compare(teller: Teller, name: str, model: ModelConfig) -> None:
    """A line for each precision and column."""
    choices = ChoiceLog()
    with kept(choices):
        reference = assembled(observe(configured(model, Precision.fp64), STEPS))
    for precision, limits in LIMITS.items():
        own = ChoiceLog(choices.made)
        with again(own):
            found = assembled(_on_host(observe(configured(model, precision), STEPS, device=teller.device)))
        for column, (value, key) in furthest(found, reference).items():
            where = f"step {key.step}, {key.kind} {key.name}".strip()
            teller.below(f"{name}, {precision.value}, {column}", value, limits[column], where)
        share, gap = OTHER[precision]
        text = f"{own.other} of {own.compared} choices, by {own.gap:.1e} of the scores' deviation"
        teller.check(f"{name}, {precision.value}, choices", own.share <= share and own.gap <= gap, text)


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


def router_models() -> dict[str, ModelConfig]:
    """A small model around each router."""
    sizes = ModelConfig(layers=2, width=32, heads=4, kv_heads=4, hidden=48, vocabulary=64, init_std=0.2)
    return {name: dataclasses.replace(sizes, moe=moe) for name, moe in ROUTERS.items()}
