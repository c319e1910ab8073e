"""Initial weights: each number depends on the run's seed, the global name of its tensor and its offset there, and on nothing else.

So the weights do not depend on the layout, the device, the order of construction or the number of layers, experts or tokens.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .philox import normal, uniform, words_of_rectangle

PIECE, PIECE_ON_HOST = 2**22, 2**17
"""Numbers that are drawn at a time; temporary memory is about 64 bytes for each. On the host they stay in a core's cache."""


def initialise(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fills all weights of a model, or of a part with a `config`, that is whole on its device. Nothing is drawn on the meta device.

    `prefix`: what precedes the names of the part's tensors in the whole model, such as "layers.0.moe.".
    """
    config: Any = module.config
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:
            fill(parameter.data, prefix + name, tuple(parameter.shape), config, seed)
    reset_expert_biases(module)


def reset_expert_biases(model: nn.Module) -> None:
    """Zeroes the expert biases; on a model from the meta device they are uninitialised."""
    for bias in expert_biases(model).values():
        bias.zero_()


def expert_biases(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers of auxiliary-loss-free balancing by name, in the order of the layers. They are whole on every rank."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("router.expert_bias")}


def fill(
    local: Tensor, name: str, shape: tuple[int, ...], config: ModelConfig, seed: int, offsets: tuple[int, ...] | None = None
) -> None:
    """Writes initial values into `local`: a rectangle of the tensor `name` of global `shape`, from `offsets` on, or all of it.

    Norms are ones (zeros if 1 is added), biases and sinks zeros. All else is random: normal, but for parts of gated DeltaNet.
    Only the rectangle is drawn. Weights are rounded from fp32, whatever type they have.
    """
    if "norm" in name:
        local.fill_(0.0 if config.zero_centered_norms and "output_norm" not in name else 1.0)
        return
    of_delta_net = name.endswith((".dt_bias", ".a_log", "_conv.weight"))
    if not of_delta_net and (name.endswith((".bias", ".sinks")) or "_bias" in name):
        local.zero_()
        return
    values = _delta_net_values(name, shape) if of_delta_net else _normal_values(name, config)
    on = torch.device("cpu") if name.endswith((".dt_bias", ".a_log")) else local.device
    for part, first in _pieces(local, offsets or (0,) * len(shape), PIECE_ON_HOST if on.type == "cpu" else PIECE):
        words = words_of_rectangle(f"{seed}/{name}", shape, first, part.shape, on)
        part.copy_(values(words).view(part.shape))


def _pieces(local: Tensor, offsets: Sequence[int], most: int) -> Iterator[tuple[Tensor, Sequence[int]]]:
    """Yields parts of the rectangle `local` that have at most `most` numbers, with their offsets in the global tensor."""
    if local.numel() <= most:
        if local.numel():
            yield local, offsets
        return
    dim = next(dim for dim, size in enumerate(local.shape) if size > 1)
    size = max(1, most * local.shape[dim] // local.numel())
    for begin, part in zip(range(0, local.shape[dim], size), local.split(size, dim), strict=True):
        yield from _pieces(part, [*offsets[:dim], offsets[dim] + begin, *offsets[dim + 1 :]], most)


def _normal_values(name: str, config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Output projections have a smaller deviation (GPT-2)."""
    writes_residual = ".o.weight" in name or ".down" in name
    std = config.init_std / math.sqrt(2 * config.layers) if writes_residual else config.init_std
    return lambda words: normal(words, std)


def _delta_net_values(name: str, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Returns the initial values of Mamba 2 (Dao and Gu 2024), which gated DeltaNet has taken over, from random words.

    The rate of decay is uniform in (0.01, 16) (transformers' lower bound), its step log-uniform in (0.001, 0.1), before softplus;
    weights of the convolutions are uniform within 1 / sqrt(K) of zero, torch's default. Logarithms, of a few numbers, are computed
    in fp64 on the host, whose last bits the rounding to fp32 removes.
    """
    if name.endswith("_conv.weight"):
        return lambda words: uniform(words).mul_(1 / math.sqrt(shape[-1]))

    def values(words: Tensor) -> Tensor:
        unit = uniform(words).double().add(1).div(2)
        if name.endswith(".a_log"):
            return (0.01 + unit * (16 - 0.01)).log().float()
        step = torch.exp(math.log(0.001) + unit * math.log(0.1 / 0.001))
        return (step + torch.log(-torch.expm1(-step))).float()

    return values
