"""Sizes of MoE layers, and layers of ours in them."""

from typing import NamedTuple

import torch
from torch import nn

from ..moe.config import ModelConfig, MoEConfig
from ..moe.layer import MoELayer


class LayerShape(NamedTuple):
    """Of an MoE layer, with softmax over all experts and weights that add up to one, whatever the model of that name does."""

    width: int
    hidden: int
    """Of one expert."""
    experts: int
    top_k: int
    tokens: int
    shared: int = 0

    @property
    def flops(self) -> int:
        """Of forward and backward, the matrix products of the experts alone: 3 x 2 FLOPs a weight and row."""
        return 18 * self.width * (self.top_k * self.hidden + self.shared) * self.tokens

    @property
    def title(self) -> str:
        return f"d {self.width}, {self.experts} x {self.hidden}, top-{self.top_k}"


def our_layer(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """With random weights, of the scale of a normal initialisation."""
    moe = MoEConfig(experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, shared_hidden=shape.shared)
    layer = MoELayer(ModelConfig(width=shape.width, moe=moe), dtype).to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=shape.width**-0.5)
    return layer
