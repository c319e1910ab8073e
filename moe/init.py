"""Initial weights: each tensor (and each expert in it) has its own generator, seeded by the run's seed and its global name.

So the weights do not depend on the layout, the order of construction or the number of layers.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .config import ModelConfig
from .model import Transformer


def initialise(model: Transformer, seed: int) -> None:
    """Fills all weights of a model that is whole on its device."""
    for name, parameter in model.named_parameters():
        fill(parameter.data, name, tuple(parameter.shape), model.config, seed)
    reset_expert_biases(model)


def reset_expert_biases(model: Transformer) -> None:
    """Zeroes the expert biases; on a model from the meta device they are uninitialised."""
    for bias in expert_biases(model).values():
        bias.zero_()


def expert_biases(model: Transformer) -> dict[str, Tensor]:
    """Returns the buffers of auxiliary-loss-free balancing by name, in the order of the layers. They are whole on every rank."""
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("router.expert_bias")}


def fill(
    local: Tensor,
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    seed: int,
    cut: Callable[[Tensor], Tensor] | None = None,
    experts: range | None = None,
) -> None:
    """Writes initial values into `local`, this rank's part of the tensor `name` of global `shape`.

    Experts are drawn one by one, so a rank never draws those of other ranks: `experts` are the global ids in `local`.
    `cut` takes the rank's part of a whole tensor, or of a whole expert.
    """
    if ".experts." not in name:
        whole = _draw(name, shape, config, seed)
        local.copy_(whole if cut is None else cut(whole))
        return
    for index, expert in enumerate(experts if experts is not None else range(shape[0])):
        whole = _draw(f"{name}.{expert}", shape[1:], config, seed)
        local[index].copy_(whole if cut is None else cut(whole))


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """Ones for norms (zeros if 1 is added), zeros for biases and sinks; else random: normal, but for parts of gated DeltaNet.

    Output projections have a smaller deviation (GPT-2).
    """
    if "norm" in name:
        return torch.zeros(shape) if config.zero_centered_norms and "output_norm" not in name else torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    if name.endswith((".dt_bias", ".a_log", "_conv.weight")):
        return _draw_delta_net(name, torch.rand(shape, generator=generator))
    if name.endswith((".bias", ".sinks")) or "_bias" in name:  # e.g. down_bias.7, of an expert
        return torch.zeros(shape)
    std = config.init_std
    if ".o.weight" in name or ".down" in name:
        std /= math.sqrt(2 * config.layers)
    return torch.randn(shape, generator=generator) * std


def _draw_delta_net(name: str, uniform: Tensor) -> Tensor:
    """Returns the initial values of Mamba 2 (Dao and Gu 2024), which gated DeltaNet has taken over, from numbers in [0, 1).

    The rate of decay is uniform in [0.01, 16) (transformers' lower bound), its step log-uniform in [0.001, 0.1), before softplus;
    weights of the convolutions are uniform within 1 / sqrt(K) of zero, torch's default.
    """
    if name.endswith(".a_log"):
        return (0.01 + uniform * (16 - 0.01)).log()
    if name.endswith(".dt_bias"):
        step = torch.exp(math.log(0.001) + uniform * math.log(0.1 / 0.001))
        return step + torch.log(-torch.expm1(-step))
    return (2 * uniform - 1) / math.sqrt(uniform.shape[-1])
