"""Megatron-Core's MoE layer in our transformer: alltoall dispatcher, sequential experts (its grouped ones need CUDA)."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ...moe.layer import MoELayer
from .cases import Case
from .deepspeed import alone
from .ours import DTYPES, Built, build_with


def build(case: Case, variant: str) -> Built:
    """There are no variants."""
    core = "megatron.core"
    alone()
    if not (state := import_module(f"{core}.parallel_state")).model_parallel_is_initialized():
        state.initialize_model_parallel()
    import_module(f"{core}.tensor_parallel.random").initialize_rng_tracker()
    do_without_cuda()
    moe = import_module(f"{core}.transformer.moe.moe_layer")
    spec = import_module(f"{core}.transformer.spec_utils").ModuleSpec
    experts, submodules = import_module(f"{core}.models.backends").LocalSpecProvider().grouped_mlp_modules(False, False)
    parts = moe.MoESubmodules(experts=spec(module=experts, submodules=submodules))
    config = import_module(f"{core}.transformer.transformer_config").TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.width,
        num_attention_heads=case.heads,
        ffn_hidden_size=case.hidden,
        moe_ffn_hidden_size=case.hidden,
        num_moe_experts=case.experts,
        moe_router_topk=case.top_k,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=DTYPES[case.precision],
        bf16=case.precision == "bf16",
    )

    def convert(layer: MoELayer) -> nn.Module:
        theirs = moe.MoELayer(config, parts)
        theirs.set_layer_number(1)
        copy_weights(layer, theirs)
        return theirs

    return build_with(case, convert)


def do_without_cuda() -> None:
    """It asks for the CUDA device of its weights, copies counts to the host on a stream (here they are there already), and has no
    name for a product of Transformer Engine where that is not installed."""
    moe = "megatron.core.transformer.moe"
    dispatcher: Any = import_module(f"{moe}.token_dispatcher").MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = ()
    dispatcher._maybe_dtoh_and_synchronize = lambda self, point, counts_E=None: counts_E
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    vars(import_module(f"{moe}.moe_utils")).setdefault("te_general_gemm", None)


def copy_weights(ours: MoELayer, theirs: nn.Module) -> None:
    assert ours.router.weight is not None
    with torch.no_grad():
        theirs.get_parameter("router.weight").copy_(ours.router.weight)
        for expert in range(len(ours.experts.down)):
            prefix = f"experts.local_experts.{expert}"
            theirs.get_parameter(f"{prefix}.linear_fc1.weight").copy_(ours.experts.gate_up[expert].flatten(0, 1))
            theirs.get_parameter(f"{prefix}.linear_fc2.weight").copy_(ours.experts.down[expert])
