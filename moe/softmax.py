"""Settings of the attention softmax, soft cap and sinks. B sequences, S tokens, H heads, v width of a value."""

import math
from typing import NamedTuple

from torch import Tensor

from .config import ModelConfig


class Softmax(NamedTuple):
    """Logits are products times `scale`, then soft-capped; a token attends to the last `window` tokens, itself included."""

    scale: float
    softcap: float | None
    window: int | None
    largest_H: Tensor | None = None
    """Where attention keeps the largest logit of each head, before the soft cap; None: it does not look."""


def softmax_of(config: ModelConfig, index: int, width: int, factor: float = 1.0) -> Softmax:
    """Returns the settings of block `index`, whose queries have `width` dimensions. `factor` multiplies the default scale."""
    settings = config.attention
    scale = factor / math.sqrt(width) if settings.scale is None else settings.scale
    return Softmax(scale, settings.softcap, settings.window if config.windowed_layer(index) else None)


def apply_softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap): close to x if it is small, and never beyond the cap (Gemma 2)."""
    return (x / cap).tanh() * cap


def apply_sinks(y_BHSv: Tensor, logsumexp_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """Scales outputs by the share of the softmax that the sinks leave. The result has the dtype of the logarithms."""
    kept_BHS = (logsumexp_BHS - sinks_H.to(logsumexp_BHS.dtype)[:, None]).sigmoid()
    return y_BHSv * kept_BHS.unsqueeze(-1)
