"""torchtitan's MoE block in our transformer: softmax over all experts, the chosen weights divided by their sum."""

from importlib import import_module

import torch
from torch import nn

from ...moe.layer import MoELayer
from .cases import Case
from .ours import DTYPES, Built, build_with


def build(case: Case, variant: str) -> Built:
    """There are no variants."""
    moe = import_module("torchtitan.models.common.moe")
    linear = import_module("torchtitan.models.common.linear").Linear
    dispatcher = import_module("torchtitan.models.common.token_dispatcher").LocalTokenDispatcher
    config = moe.MoE.Config(
        num_experts=case.experts,
        routed_experts=moe.RoutedExperts.Config(
            inner_experts=moe.GroupedExperts.Config(dim=case.width, hidden_dim=case.hidden, num_experts=case.experts),
            token_dispatcher=dispatcher.Config(num_experts=case.experts, top_k=case.top_k),
        ),
        router=moe.TokenChoiceTopKRouter.Config(
            num_experts=case.experts,
            gate=linear.Config(in_features=case.width, out_features=case.experts),
            top_k=case.top_k,
            score_func="softmax",
            route_norm=True,
        ),
        load_balance_coeff=None,
    )

    def convert(layer: MoELayer) -> nn.Module:
        theirs = config.build().to(DTYPES[case.precision])
        copy_weights(layer, theirs)
        return theirs

    return build_with(case, convert)


def copy_weights(ours: MoELayer, theirs: nn.Module) -> None:
    gate_EFD, up_EFD = ours.experts.gate_up.unbind(1)
    assert ours.router.weight is not None
    with torch.no_grad():
        theirs.get_parameter("router.gate.weight").copy_(ours.router.weight)
        theirs.get_parameter("routed_experts.inner_experts.w1_EFD").copy_(gate_EFD)
        theirs.get_parameter("routed_experts.inner_experts.w3_EFD").copy_(up_EFD)
        theirs.get_parameter("routed_experts.inner_experts.w2_EDF").copy_(ours.experts.down)
