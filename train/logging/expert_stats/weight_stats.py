"""Statistics of the parameters: the gradient norm of each expert, and the similarity of the experts.

L layers that route, E experts. Every rank adds the part that it holds, so the numbers are those of one device.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from ....moe.config import ModelConfig
from ....moe.init import expert_biases
from ....moe.param_shapes import block_shapes
from ....parallel.apply import Parallel, ShardedParameter, local
from ....parallel.collectives import sum_over

CORNER = 64
"""Experts are compared by the first 64 x 64 weights of each of their matrices, so that little has to be communicated."""

_PLACE = re.compile(r"(layers|mtp)\.(\d+)\.")


class GradientNorms(NamedTuple):
    experts_LE: Tensor
    """The norm of each expert's gradient, fp64."""
    router: Tensor
    """The norm of the gradient of all routers together."""


def gradient_norms(parallel: Parallel, layers: list[int], scale: Tensor | float) -> GradientNorms:
    """Returns the norms of the last step's gradients, divided by `scale` (the factor of clipping). Collective."""
    experts = parallel.model.config.moe.experts
    squares = torch.zeros(len(layers) * experts + 1, dtype=torch.float64, device=parallel.device)
    squares_LE = squares[:-1].view(len(layers), experts)
    for name, sharded in parallel.parameters.items():
        if sharded.parameter.grad is None:
            continue
        gradient = local(sharded.parameter.grad)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if ".experts." in name:
            squares_E = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=wide).double().square() / sharded.replicas.size
            first = sharded.metadata.offsets[0]
            squares_LE[row_of(name, parallel.model.config, layers), first : first + len(squares_E)] += squares_E
        elif ".router." in name:
            squares[-1] += torch.linalg.vector_norm(gradient).double().square() / sharded.replicas.size
    norms = sum_over(squares, parallel.mesh.everyone).sqrt() / scale
    return GradientNorms(norms[:-1].view(len(layers), experts), norms[-1])


def similarity(parallel: Parallel, layers: list[int], chosen: list[int]) -> dict[int, Tensor]:
    """Returns for each chosen layer the cosines between the experts' weights, (E, E), by a corner of each matrix, to 4 digits.

    Collective."""
    config, found = parallel.model.config, {}
    for layer in chosen:
        names = [name for name in parallel.parameters if ".experts." in name and layers[row_of(name, config, layers)] == layer]
        shares = [_corner(parallel.parameters[name], parallel.device) for name in sorted(names)]
        shares = shares or [torch.zeros(config.moe.experts, _corner_width(config), dtype=torch.float64, device=parallel.device)]
        corners = torch.cat(shares, dim=1)
        unit_ED = torch.nn.functional.normalize(sum_over(corners, parallel.mesh.everyone), dim=1)
        found[layer] = (unit_ED @ unit_ED.T).clamp(-1, 1).round(decimals=4).cpu()
    return found


def biases(parallel: Parallel) -> Tensor | None:
    """Returns the biases of the experts, (L, E), without null experts; None if no router has any. Collective with a pipeline."""
    config, pipeline = parallel.model.config, parallel.pipeline
    found = [bias[: config.moe.experts] for bias in expert_biases(parallel.model).values()]
    if pipeline is None or config.moe.balance.bias_rate == 0:
        return torch.stack(found) if found else None
    bias_LE = torch.zeros(pipeline.moe_layers, config.moe.experts, device=parallel.device)
    for row, bias_E in zip(pipeline.all_rows, found, strict=True):
        bias_LE[row] = bias_E / parallel.mesh.stage.size
    return sum_over(bias_LE, parallel.mesh.everyone)


def row_of(name: str, config: ModelConfig, layers: list[int]) -> int:
    """Returns the row of the parameter's layer; blocks of multi-token prediction follow the model's own."""
    found = _PLACE.match(name)
    assert found is not None, name
    return layers.index(int(found[2]) + (config.layers if found[1] == "mtp" else 0))


def _corner_width(config: ModelConfig) -> int:
    """Returns the weights of an expert that are compared, which a stage of a pipeline without the layer has to know."""
    index = next(index for index in range(config.layers + config.mtp_depth) if config.moe_layer(index))
    found = {name: shape for name, shape in block_shapes(config, index).items() if ".experts." in name}
    return sum(math.prod(min(CORNER, size) for size in shape[1:]) for shape in found.values())


def _corner(sharded: ShardedParameter, device: torch.device) -> Tensor:
    """Returns this rank's share of the corner, fp64 (E, weights), whose sum over all ranks is the corner itself."""
    shard = sharded.metadata
    region = (shard.shape[0], *(min(CORNER, size) for size in shard.shape[1:]))
    corner = torch.zeros(region, dtype=torch.float64, device=device)
    ends = [min(offset + size, limit) for offset, size, limit in zip(shard.offsets, shard.sizes, region, strict=True)]
    if all(offset < end for offset, end in zip(shard.offsets, ends, strict=True)):
        there = tuple(slice(offset, end) for offset, end in zip(shard.offsets, ends, strict=True))
        here = tuple(slice(0, end - offset) for offset, end in zip(shard.offsets, ends, strict=True))
        corner[there] = local(sharded.parameter.data)[here].double() / sharded.replicas.size
    return corner.view(region[0], math.prod(region[1:]))
