"""Sparse upcycling (Komatsuzaki et al. 2023): makes a Mixture of Experts of a dense model, with the same first forward pass.

Without granularity each expert is a copy of the dense feed-forward, so the expert outputs, whose weights sum to 1, add up to its
output. With granularity G (He et al. 2024) the hidden units are cut into G slices. G consecutive experts hold one slice each; they
form a virtual group and share a row of the router, so a token always chooses whole groups and each slice gets 1/G of the group's
weight. To make up for that the slices' outputs are multiplied by G.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..moe.config import ModelConfig, MoEConfig
from ..parallel.shard import LocalShard, ShardMetadata

if TYPE_CHECKING:
    from torch import Tensor


class Upcycle(NamedTuple):
    """Options of --upcycle and of checkpoint.upcycle: the experts to make of each dense feed-forward."""

    experts: int
    """Experts of each layer, slices included."""
    top_k: int = 2
    """Experts per token: granularity times the virtual groups per token."""
    granularity: int = 1
    """Slices into which the hidden units are cut."""
    seed: int = 1
    """Seed of the routers' weights."""


def upcycle(weights: "dict[str, Tensor]", dense: ModelConfig, options: Upcycle) -> ModelConfig:
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


def read_upcycled(
    read: Callable[[dict[str, LocalShard]], object], held: dict[str, LocalShard], model: ModelConfig, options: Upcycle
) -> None:
    """Fills `held`, rectangles of tensors of the new `model` by name. Beside them, memory holds one rectangle of a dense tensor.

    read: fills rectangles of tensors of the dense model.
    """
    import torch

    read({name: shard for name, shard in held.items() if ".moe." not in name})
    for name, (metadata, mine) in held.items():
        if name.endswith(".moe.router.weight"):
            mine.copy_(metadata.cut(_router(name, model, options)))
        if ".moe.experts." not in name:
            continue
        shape, offsets, sizes = metadata
        # Local experts that are granularity apart hold the same slice.
        for first in range(min(options.granularity, sizes[0])):
            begin = (offsets[0] + first) % options.granularity * shape[2]
            slice_of_dense = ShardMetadata(
                (shape[1], shape[2] * options.granularity, *shape[3:]), (offsets[1], begin + offsets[2], *offsets[3:]), sizes[1:]
            )
            units = torch.empty(sizes[1:], dtype=mine.dtype, device=mine.device)
            read({name.replace(".moe.experts.", ".dense."): LocalShard(slice_of_dense, units)})
            mine[first :: options.granularity].copy_(units * options.granularity if name.endswith(".down") else units)


def upcycled_config(dense: ModelConfig, options: Upcycle, place: str = "--upcycle ") -> ModelConfig:
    """The configuration of the new model. Raises ValueError, one line, for options that do not fit `dense`.

    place: what stands before the name of an option in errors, that of a flag or of a section of settings.
    """

    def wrong(name: str, rule: str, nearest: int | None = None) -> ValueError:
        instead = "" if nearest is None else f"; nearest valid: {place if place.endswith('.') else ''}{name}={nearest}"
        return ValueError(f"{place}{name}={getattr(options, name)}: {rule}{instead}")

    if dense.moe.experts:
        raise ValueError(f"{place.strip('. ')}: the model has experts already; it takes a dense one")
    for name, least, why in LEAST:
        if getattr(options, name) < least:
            raise wrong(name, f"must be at least {least}{why}", least)
    for name in ("experts", "top_k"):
        number, unit = getattr(options, name), options.granularity
        if number % unit:
            raise wrong(name, f"must be a multiple of granularity={unit}", max(1, round(number / unit)) * unit)
    if options.top_k > options.experts:
        raise wrong("top_k", f"must be at most experts={options.experts}", options.experts)
    if dense.hidden % (8 * options.granularity):
        raise wrong("granularity", f"must cut the hidden width {dense.hidden} into slices of a multiple of 8")
    model = copy.deepcopy(dense)
    model.dense_first, model.moe_every, model.dense_layers = 0, 1, []
    model.moe = MoEConfig(options.experts, options.top_k, dense.hidden // options.granularity, activation=dense.activation)
    return model


LEAST = (
    ("experts", 2, ""),
    ("top_k", 2, ", with one expert a token its weight is below 1"),
    ("granularity", 1, ""),
    ("seed", 0, ""),
)


def _copies(units: "Tensor", options: Upcycle) -> "Tensor":
    """Makes (E, ..., F / G, ...) of (..., F, ...), with the hidden units in dimension 1: expert e has slice e modulo G."""
    slices = units.unflatten(1, (options.granularity, -1)).movedim(1, 0)
    return slices.repeat(options.experts // options.granularity, *[1] * units.ndim)


def _router(name: str, model: ModelConfig, options: Upcycle) -> "Tensor":
    """Router weights of (E, D): one random row for each virtual group, initialised as in a new model."""
    import torch

    from ..moe.init import fill

    rows = torch.empty(options.experts // options.granularity, model.width)
    fill(rows, name, tuple(rows.shape), model, options.seed)
    return rows.repeat_interleave(options.granularity, 0)
