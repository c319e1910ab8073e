"""Does a checkpoint hold the tensors of the model that its configuration describes? Asked before any is made. No torch here."""

from collections.abc import Mapping
from typing import Any

from ...moe.config import ModelConfig
from ...moe.param_shapes import shapes
from .bounded import brief
from .manifest import TensorRecord

PREFIX = "model."
BIAS = ".expert_bias"
"""Ending of the one kind of tensor that a model may hold beside its parameters: a number for each output of the router."""


def check_fits(model: ModelConfig, tensors: Mapping[str, TensorRecord], path: Any) -> None:
    """ValueError for the first parameter of `model` that `tensors` lacks or has in another shape; and for one too many."""
    stored = {name.removeprefix(PREFIX): record.shape for name, record in tensors.items() if name.startswith(PREFIX)}
    try:
        if model.layers > len(stored):
            raise ValueError(f"model.layers={model.layers}: {path} holds {len(stored)} tensors")
        wanted = shapes(model)
    except (ArithmeticError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path}: its configuration makes no model: {error}") from None
    for name, shape in wanted.items():
        if stored.get(name) != shape:
            there = f"has the shape {stored[name]}" if name in stored else "is missing"
            raise ValueError(f"checkpoint {path}: tensor {brief(PREFIX + name)} must be {shape} by its configuration and {there}")
    for name in stored.keys() - wanted.keys():
        router = wanted.get(name.removesuffix(BIAS) + ".weight")
        if not name.endswith(BIAS) or router is None or stored[name] != router[:1]:
            raise ValueError(
                f"checkpoint {path}: tensor {brief(PREFIX + name)} is none of the model that its configuration describes"
            )
