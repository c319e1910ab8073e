"""Our sides: MoE, MoE with drops, dense; and our transformer with the MoE layers of another system."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...data.batches import IGNORE
from ...moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope
from ...moe.layer import MoELayer
from ...moe.model import Transformer
from ...parallel.mesh import Axis
from ...parallel.vocabulary import head_loss
from .cases import CAPACITY, Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALONE = Axis(1, 0, None)
SEED = 0


class Built(NamedTuple):
    """A model, and the function from ids and targets, both (B, S), to its mean cross entropy."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]


def build(case: Case, variant: str) -> Built:
    """`variant`: any of the words dense, drops, wide (fp32 weights for any dtype of activations)."""
    words = variant.split()
    model = transformer(case, "dense" in words, "drops" in words, torch.float32 if "wide" in words else DTYPES[case.precision])
    return Built(model, partial(loss_of, model))


def build_with(case: Case, convert: Callable[[MoELayer], nn.Module]) -> Built:
    """Our transformer with each MoE layer replaced by `convert(layer)`, a module from (B, S, D) to (B, S, D), or to a tuple that
    begins with it."""
    model = transformer(case, weights=DTYPES[case.precision])
    for block in model.blocks:
        assert block.moe is not None
        block.register_module("moe", OtherLayer(convert(block.moe)))
    return Built(model, partial(loss_of, model))


def transformer(case: Case, dense: bool = False, drops: bool = False, weights: torch.dtype | None = None) -> Transformer:
    """Returns our transformer with initial weights."""
    return Transformer(model_config(case, dense, drops), DTYPES[case.precision], weights, seed=SEED)


def model_config(case: Case, dense: bool, drops: bool) -> ModelConfig:
    """No auxiliary losses, because not all sides have them. The capacity counts over the whole batch, as DeepSpeed's does."""
    moe = MoEConfig(
        experts=0 if dense else case.experts,
        top_k=case.top_k,
        hidden=case.hidden,
        balance=BalanceConfig(coefficient=0.0),
        z_coefficient=0.0,
        capacity=CapacityConfig(factor=CAPACITY if drops else None, scope=Scope.batch),
    )
    return ModelConfig(
        layers=case.layers,
        width=case.width,
        heads=case.heads,
        kv_heads=case.heads,
        hidden=case.top_k * case.hidden,
        vocabulary=case.vocabulary,
        moe=moe,
    )


def loss_of(model: Transformer, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
    """Returns the mean cross entropy, as train/step.py computes it."""
    valid_BS = targets_BS != IGNORE
    head = partial(head_loss, targets=targets_BS, ignore=IGNORE, axis=ALONE)
    (summed,), _ = model(ids_BS, valid_BS, head_losses=[head])
    return summed / valid_BS.sum()


class OtherLayer(nn.Module):
    """Replaces a MoELayer; returns no statistics."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BSD: Tensor, tokens: Any = None) -> tuple[Tensor, None]:
        y_BSD = self.layer(x_BSD)
        return (y_BSD[0] if isinstance(y_BSD, tuple) else y_BSD), None
