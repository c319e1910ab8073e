"""How products of queries and keys become probabilities. B sequences, S tokens, H heads, v width of a value."""

import math
from typing import NamedTuple

from torch import Tensor

from .config import ModelConfig


class Softmax(NamedTuple):
    """Products are multiplied by `scale`, then soft-capped; a token sees the last `window` tokens, itself included."""

    scale: float
    softcap: float | None
    window: int | None


def softmax_of(config: ModelConfig, index: int, width: int, factor: float = 1.0) -> Softmax:
    """That of block `index`, whose queries have `width` dimensions; `factor` is one more of the usual scale."""
    settings = config.attention
    scale = factor / math.sqrt(width) if settings.scale is None else settings.scale
    return Softmax(scale, settings.softcap, settings.window if config.windowed_layer(index) else None)


def apply_softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): about x where it is small, never beyond the cap (Gemma 2)."""
    return (x / cap).tanh() * cap


def apply_sinks(y_BHSv: Tensor, logsumexp_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """A sink's share of the softmax takes the same fraction from every value. The result is as wide as the logarithms."""
    kept_BHS = (logsumexp_BHS - sinks_H.to(logsumexp_BHS.dtype)[:, None]).sigmoid()
    return y_BHSv * kept_BHS.unsqueeze(-1)
