"""Sparse upcycling (Komatsuzaki et al. 2023): a dense model becomes a Mixture of Experts whose first forward pass is the same.

Without granularity each expert is the dense feed-forward, so a token's outputs, whose weights sum to 1, add up to it. With
granularity G (He et al. 2024) the hidden units are cut into G slices. G experts in a row hold one slice each; they are a virtual
group and have the same row of the router, so a token always chooses whole groups, and each slice gets 1/G of the weight. For that
the slices' outputs are G times as large. Chosen groups may weigh differently; within a group weights are equal by construction.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor

from ..moe.config import ModelConfig, MoEConfig
from ..moe.init import fill


class Upcycle(NamedTuple):
    """What to make of each dense feed-forward."""

    experts: int
    """Experts in each layer, all slices counted."""
    top_k: int = 2
    """Experts that a token chooses: granularity times the virtual groups."""
    granularity: int = 1
    """Slices of the hidden units."""
    seed: int = 1
    """Decides the router, with its tensors' names."""


def upcycle(weights: dict[str, Tensor], dense: ModelConfig, wish: Upcycle) -> ModelConfig:
    """Put experts in the place of the dense feed-forwards in `weights`, one layer at a time, and return the new configuration."""
    model = upcycled_config(dense, wish)
    for index in range(model.layers):
        prefix = f"layers.{index}."
        gate_up, down = weights.pop(f"{prefix}dense.gate_up"), weights.pop(f"{prefix}dense.down")
        weights |= {
            f"{prefix}moe.router.weight": _router(f"{prefix}moe.router.weight", model, wish).to(down.dtype),
            f"{prefix}moe.experts.gate_up": _copies(gate_up, wish),
            f"{prefix}moe.experts.down": _copies(down * wish.granularity, wish),
        }
    return model


def upcycled_config(dense: ModelConfig, wish: Upcycle) -> ModelConfig:
    """The configuration of the new model. ValueError, one line, for what cannot be upcycled so."""
    if dense.moe.experts:
        raise ValueError("--upcycle: the model has experts already; it takes a dense one")
    for name, least, why in LEAST:
        if getattr(wish, name) < least:
            raise ValueError(
                f"--upcycle {name}={getattr(wish, name)}: must be at least {least}{why}; nearest valid: {name}={least}"
            )
    for name in ("experts", "top_k"):
        number, unit = getattr(wish, name), wish.granularity
        if number % unit:
            nearest = max(1, round(number / unit)) * unit
            raise ValueError(
                f"--upcycle {name}={number}: must be a multiple of granularity={unit}; nearest valid: {name}={nearest}"
            )
    if wish.top_k > wish.experts:
        raise ValueError(
            f"--upcycle top_k={wish.top_k}: must be at most experts={wish.experts}; nearest valid: top_k={wish.experts}"
        )
    if dense.hidden % (8 * wish.granularity):
        raise ValueError(
            f"--upcycle granularity={wish.granularity}: must cut the hidden width {dense.hidden} into slices of a multiple of 8"
        )
    model = copy.deepcopy(dense)
    model.dense_first, model.moe_every = 0, 1
    model.moe = MoEConfig(wish.experts, wish.top_k, dense.hidden // wish.granularity, activation=dense.activation)
    return model


LEAST = (
    ("experts", 2, ""),
    ("top_k", 2, ", with one expert a token its weight is below 1"),
    ("granularity", 1, ""),
    ("seed", 0, ""),
)


def _copies(units: Tensor, wish: Upcycle) -> Tensor:
    """(..., F, ...) with the hidden units in dimension 1 to (E, ..., F / G, ...): expert e has slice e modulo G."""
    slices = units.unflatten(1, (wish.granularity, -1)).movedim(1, 0)
    return slices.repeat(wish.experts // wish.granularity, *[1] * units.ndim)


def _router(name: str, model: ModelConfig, wish: Upcycle) -> Tensor:
    """(E, D): a random row for each virtual group, as a new model with so many experts would have it."""
    rows = torch.empty(wish.experts // wish.granularity, model.width)
    fill(rows, name, tuple(rows.shape), model, wish.seed)
    return rows.repeat_interleave(wish.granularity, 0)
