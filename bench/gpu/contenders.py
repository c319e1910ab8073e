"""MoE layers that compute the same: ours, those of other libraries if they are installed, and the dense products as upper bound.

All have the same weights, and our shared expert if there is one. T tokens, D width, F hidden width of an expert, E experts,
K choices of a token, R = T * K rows, H hidden width of a dense layer.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...moe import device
from ...moe.feedforward import FeedForward
from ...moe.layer import MoELayer
from ..layer import LayerShape, our_layer
from .recorder import Unavailable

Forward = Callable[[Tensor], Tensor]
"""(1, T, D) to (1, T, D)."""
WITHOUT_KERNELS = "tokenyard without its kernels"


def without_kernels(work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` with the code that the kernels of moe/kernels/ replace."""

    def run() -> Any:
        with patch.object(device, "KERNELS", False):
            return work()

    return run


def contenders(ours: MoELayer, shape: LayerShape) -> dict[str, Callable[[], Forward]]:
    """Functions that build the layers, by name. They raise Unavailable if a library is missing, and any error if it does not
    run."""
    return {
        "tokenyard": lambda: lambda x: ours(x)[0],
        WITHOUT_KERNELS: lambda: lambda x: ours(x)[0],
        "tokenyard, fp32 weights": partial(_with_wide_weights, ours, shape),
        "dense layer of the active size": partial(_dense_layer, ours, shape),
        "transformers, grouped_mm": partial(_transformers, ours, shape),
        "SonicMoE": partial(_sonic, ours, shape),
        "MegaBlocks": partial(_megablocks, ours, shape),
    }


class DenseProducts:
    """Only the matrix products of forward and backward, with one weight for all rows: the upper bound for a layer."""

    def __init__(self, shape: LayerShape, like: Tensor) -> None:
        sizes = [(shape.tokens * shape.top_k, shape.hidden), *([(shape.tokens, shape.shared)] if shape.shared else [])]
        self.parts = [[like.new_empty(size).normal_() for size in self._sizes(shape.width, *size)] for size in sizes]

    @staticmethod
    def _sizes(width: int, rows: int, hidden: int) -> list[tuple[int, int]]:
        return [(rows, width), (2 * hidden, width), (rows, hidden), (width, hidden), (rows, width), (rows, 2 * hidden)]

    def __call__(self) -> None:
        for x_RD, gate_up_HD, inner_RF, down_DF, grad_RD, grad_inner_RH in self.parts:
            torch.mm(x_RD, gate_up_HD.T)
            torch.mm(inner_RF, down_DF.T)
            torch.mm(grad_RD, down_DF)
            torch.mm(grad_RD.T, inner_RF)
            torch.mm(grad_inner_RH, gate_up_HD)
            torch.mm(grad_inner_RH.T, x_RD)


def _with_wide_weights(ours: MoELayer, shape: LayerShape) -> Forward:
    """Our layer with fp32 weights, as in training, which are cast where they are used."""
    layer = our_layer(shape, ours.experts.down.device, torch.float32)
    layer.load_state_dict(ours.state_dict())
    return lambda x: layer(x)[0]


def _dense_layer(ours: MoELayer, shape: LayerShape) -> Forward:
    down = ours.experts.down
    layer = FeedForward(shape.width, shape.top_k * shape.hidden + shape.shared, down.dtype).to(down.device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=shape.width**-0.5)
    return layer


def _transformers(ours: MoELayer, shape: LayerShape) -> Forward:
    """Mixtral's block, with the experts that call torch's grouped product."""
    mixtral = _module("transformers.models.mixtral.modeling_mixtral")
    config = _module("transformers").MixtralConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        block = mixtral.MixtralSparseMoeBlock(config)
    names = {
        "gate.weight": ours.router.weight,
        "experts.gate_up_proj": ours.experts.gate_up.flatten(1, 2),
        "experts.down_proj": ours.experts.down,
    }
    return _with_shared(ours, _filled(block, names))


def _sonic(ours: MoELayer, shape: LayerShape) -> Forward:
    """github.com/Dao-AILab/sonic-moe. Its rows of gate and up alternate."""
    sonic, enums = _module("sonicmoe"), _module("sonicmoe.enums")
    layer = sonic.MoE(
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        activation_function=enums.ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )
    alternating = ours.experts.gate_up.transpose(1, 2).flatten(1, 2)
    names = {"router.weight": ours.router.weight, "c_fc.weight": alternating, "c_proj.weight": ours.experts.down}
    layer = _filled(layer.to(ours.experts.down), names)
    return _with_shared(ours, lambda x: layer(x)[0])


def _megablocks(ours: MoELayer, shape: LayerShape) -> Forward:
    """github.com/databricks/megablocks, dropless, SwiGLU. It stores a balance loss for each pass, which is discarded."""
    dmoe, moe = _module("megablocks.layers.dmoe"), _module("megablocks.layers.moe")
    arguments = _module("megablocks.layers.arguments").Arguments(
        hidden_size=shape.width,
        ffn_hidden_size=shape.hidden,
        moe_num_experts=shape.experts,
        moe_top_k=shape.top_k,
        moe_normalize_expert_weights=1,
        mlp_type="glu",
        activation_fn=F.silu,
        bias=False,
        return_bias=False,
        fp16=False,
        bf16=True,
        device=ours.experts.down.device,
    )
    gate_EFD, up_EFD = ours.experts.gate_up.unbind(1)
    names = {"router.layer.weight": ours.router.weight, "experts.mlp.w1": gate_EFD, "experts.mlp.v1": up_EFD}
    layer = _filled(dmoe.dMoE(arguments), names | {"experts.mlp.w2": ours.experts.down.transpose(1, 2)})

    def forward(x: Tensor) -> Tensor:
        y = layer(x)
        moe.clear_load_balancing_loss()
        return y[0] if isinstance(y, tuple) else y

    return _with_shared(ours, forward)


def _module(name: str) -> Any:
    """Imports an optional module. Raises Unavailable if its package is not installed."""
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise Unavailable("not installed")
    return importlib.import_module(name)


def _filled(module: nn.Module, weights: dict[str, Tensor | None]) -> nn.Module:
    """`module` with copies of these weights as its parameters, in the shapes of the module and on the device of the weights."""
    for name, value in weights.items():
        assert value is not None
        path, _, last = name.rpartition(".")
        shape = module.get_parameter(name).shape
        setattr(module.get_submodule(path), last, nn.Parameter(value.detach().reshape(shape).clone()))
    return module


def _with_shared(ours: MoELayer, forward: Forward) -> Forward:
    return forward if ours.shared is None else lambda x: forward(x) + ours.shared(x)  # pyright: ignore[reportOptionalCall]
