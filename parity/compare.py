"""Compares what a rank observed with one process: a finding of plain values for each tensor."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from .config import TOLERANCE
from .finding import Finding, Key
from .observe import ObservedTensor

FLOOR = 1e-6
"""A tensor whose largest element is below this share of the largest of its kind is measured relative to that share: it may be
rounding."""


class Reference(NamedTuple):
    """The global tensors of one process, and the scale of each difference."""

    tensors: dict[Key, Tensor]
    scales: dict[Key, float]
    auxiliary: dict[str, Tensor]
    """The part of each parameter's first gradient that comes from the auxiliary losses."""


def reference_of(seen: Iterable[ObservedTensor], without_auxiliary: Iterable[ObservedTensor] = ()) -> Reference:
    """Returns the reference from what one process observed, and from its first step without auxiliary losses, for hints."""
    tensors = assemble(seen)
    largest: dict[tuple[int, str], float] = {}
    sizes = {key: _largest(tensor) for key, tensor in tensors.items()}
    for key, size in sizes.items():
        largest[key[:2]] = max(size, largest.get(key[:2], 0.0))
    scales = {key: max(size, FLOOR * largest[key[:2]], 1e-30) for key, size in sizes.items()}
    plain = {key.name: tensor for key, tensor in assemble(without_auxiliary).items() if key.kind == "gradient"}
    auxiliary = {name: tensors[Key(1, "gradient", name)] - tensor for name, tensor in plain.items()}
    return Reference(tensors, scales, auxiliary)


def assemble(seen: Iterable[ObservedTensor]) -> dict[Key, Tensor]:
    """Returns whole tensors from the shards that one process observed; floats become fp64."""
    wholes: dict[Key, Tensor] = {}
    for key, shard, tensor in seen:
        wide = tensor.double() if tensor.is_floating_point() else tensor
        if key not in wholes:
            wholes[key] = wide.new_zeros(shard.shape)
        shard.cut(wholes[key]).copy_(wide)
    return wholes


def compare(seen: Iterable[ObservedTensor], reference: Reference) -> list[Finding]:
    """Returns the finding for each tensor of this rank, in the order of computation."""
    return [_finding(each, reference) for each in seen]


def _finding(seen: ObservedTensor, reference: Reference) -> Finding:
    key, shard, tensor = seen
    expected, scale = shard.cut(reference.tensors[key]).double(), reference.scales[key]
    value = tensor.double()
    difference = _largest(value - expected) / scale
    ratio = auxiliary = None
    if not difference <= TOLERANCE:
        ratio = _factor(value, expected)
    if ratio is None and not difference <= TOLERANCE and key.kind == "gradient" and key.name in reference.auxiliary:
        part = shard.cut(reference.auxiliary[key.name])
        auxiliary = _factor(value - (expected - part), part, scale)
    shape, offsets, sizes = map(list, shard)
    finite = difference if math.isfinite(difference) else 1e300  # JSON has no infinity
    return Finding(*key, shape, offsets, sizes, finite, _digest(tensor), ratio, auxiliary)


def _factor(value: Tensor, expected: Tensor, scale: float = 0.0) -> float | None:
    """Returns the factor between `value` and `expected`, if one is a multiple of the other within the tolerance."""
    square = expected.square().sum()
    if not square > 0:
        return None
    factor = float((value * expected).sum() / square)
    measure = max(_largest(expected), scale) * max(1.0, abs(factor))
    return factor if _largest(value - factor * expected) <= TOLERANCE * measure else None


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _digest(tensor: Tensor) -> str:
    flat = tensor.contiguous().reshape(-1)
    return xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else ""
