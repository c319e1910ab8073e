"""Sparse upcycling (Komatsuzaki et al. 2023): makes a Mixture of Experts of a dense model, with the same first forward pass.

Without granularity each expert is a copy of the dense feed-forward, so the expert outputs, whose weights sum to 1, add up to its
output. With granularity G (He et al. 2024) the hidden units are cut into G slices. G consecutive experts hold one slice each; they
form a virtual group and share a row of the router, so a token always chooses whole groups and each slice gets 1/G of the group's
weight. To make up for that the slices' outputs are multiplied by G.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.config import ModelConfig, MoEConfig
from ..moe.init import fill


class Upcycle(NamedTuple):
    """Options of --upcycle: the experts to make of each dense feed-forward."""

    experts: int
    """Experts of each layer, slices included."""
    top_k: int = 2
    """Experts per token: granularity times the virtual groups per token."""
    granularity: int = 1
    """Slices into which the hidden units are cut."""
    seed: int = 1
    """Seed of the routers' weights."""


def upcycle(weights: dict[str, Tensor], dense: ModelConfig, options: Upcycle) -> ModelConfig:
    """Replaces the dense feed-forwards in `weights` by experts, one layer at a time. Returns the new configuration."""
    model = upcycled_config(dense, options)
    for index in range(model.layers):
        prefix = f"layers.{index}."
        gate_up, down = weights.pop(f"{prefix}dense.gate_up"), weights.pop(f"{prefix}dense.down")
        weights |= {
            f"{prefix}moe.router.weight": _router(f"{prefix}moe.router.weight", model, options).to(down.dtype),
            f"{prefix}moe.experts.gate_up": _copies(gate_up, options),
            f"{prefix}moe.experts.down": _copies(down * options.granularity, options),
        }
    return model


def upcycled_config(dense: ModelConfig, options: Upcycle) -> ModelConfig:
    """The configuration of the new model. Raises ValueError, one line, for options that do not fit `dense`."""
    if dense.moe.experts:
        raise ValueError("--upcycle: the model has experts already; it takes a dense one")
    for name, least, why in LEAST:
        if getattr(options, name) < least:
            raise ValueError(
                f"--upcycle {name}={getattr(options, name)}: must be at least {least}{why}; nearest valid: {name}={least}"
            )
    for name in ("experts", "top_k"):
        number, unit = getattr(options, name), options.granularity
        if number % unit:
            nearest = max(1, round(number / unit)) * unit
            raise ValueError(
                f"--upcycle {name}={number}: must be a multiple of granularity={unit}; nearest valid: {name}={nearest}"
            )
    if options.top_k > options.experts:
        raise ValueError(
            f"--upcycle top_k={options.top_k}: must be at most experts={options.experts}; nearest valid: top_k={options.experts}"
        )
    if dense.hidden % (8 * options.granularity):
        raise ValueError(
            f"--upcycle granularity={options.granularity}: must cut the hidden width {dense.hidden} into slices of a multiple of 8"
        )
    model = copy.deepcopy(dense)
    model.dense_first, model.moe_every = 0, 1
    model.moe = MoEConfig(options.experts, options.top_k, dense.hidden // options.granularity, activation=dense.activation)
    return model


LEAST = (
    ("experts", 2, ""),
    ("top_k", 2, ", with one expert a token its weight is below 1"),
    ("granularity", 1, ""),
    ("seed", 0, ""),
)


def _copies(units: Tensor, options: Upcycle) -> Tensor:
    """Makes (E, ..., F / G, ...) of (..., F, ...), with the hidden units in dimension 1: expert e has slice e modulo G."""
    slices = units.unflatten(1, (options.granularity, -1)).movedim(1, 0)
    return slices.repeat(options.experts // options.granularity, *[1] * units.ndim)


def _router(name: str, model: ModelConfig, options: Upcycle) -> Tensor:
    """Router weights of (E, D): one random row for each virtual group, initialised as in a new model."""
    rows = torch.empty(options.experts // options.granularity, model.width)
    fill(rows, name, tuple(rows.shape), model, options.seed)
    return rows.repeat_interleave(options.granularity, 0)
