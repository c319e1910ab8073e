"""Sides that other systems compute: transformers' whole model, and the MoE layers of the others in our transformer.

Each is built with our first weights, so that its first loss equals ours. The libraries are optional; a function imports its own.
"""

from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ...moe.feedforward import FeedForward
from ...moe.layer import MoELayer
from .cases import CAPACITY, Case
from .ours import DTYPES, Built, build_with, transformer

OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
INSIDE = {
    "attention_norm.weight": "input_layernorm.weight",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
} | {f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
"""From our parameter names to those of transformers, within a layer."""


def build_transformers(case: Case, variant: str) -> Built:
    """MixtralForCausalLM; `variant` is its implementation of the experts."""
    ours = transformer(case, weights=DTYPES[case.precision])
    transformers = import_module("transformers")
    config = transformers.MixtralConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        max_position_embeddings=case.length,
        num_local_experts=case.experts,
        num_experts_per_tok=case.top_k,
        rms_norm_eps=ours.config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": ours.config.attention.rope.theta},
        use_cache=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[case.precision], attn_implementation="sdpa", experts_implementation=variant
    )
    assert model.config._experts_implementation == variant
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            target = weights.pop(transformers_name(name))
            target.copy_(weight.view(target.shape))  # gate and up, (E, 2, F, D), are (E, 2 * F, D) there
    assert not weights, f"without a weight of ours: {sorted(weights)}"

    def loss(ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return model(input_ids=ids_BS, labels=ids_BS).loss  # it shifts the labels to the same targets

    return Built(model, loss)


def transformers_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, index, inside = name.split(".", 2)
    return f"model.layers.{index}.{INSIDE[inside]}"


def build_torchtitan(case: Case, variant: str) -> Built:
    """torchtitan's MoE layer: softmax over all experts, the chosen weights divided by their sum. It has no variants."""
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
        gate_EFD, up_EFD = layer.experts.gate_up.unbind(1)
        copy_weights(
            theirs,
            {
                "router.gate.weight": layer.router.weight,
                "routed_experts.inner_experts.w1_EFD": gate_EFD,
                "routed_experts.inner_experts.w3_EFD": up_EFD,
                "routed_experts.inner_experts.w2_EDF": layer.experts.down,
            },
        )
        return theirs

    return build_with(case, convert)


def build_megatron(case: Case, variant: str) -> Built:
    """Megatron-Core's MoE layer: alltoall dispatcher, sequential experts (its grouped ones need CUDA). It has no variants."""
    core = "megatron.core"
    join_alone()
    if not (state := import_module(f"{core}.parallel_state")).model_parallel_is_initialized():
        state.initialize_model_parallel()
    import_module(f"{core}.tensor_parallel.random").initialize_rng_tracker()
    run_megatron_without_cuda()
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
        weights: dict[str, Any] = {"router.weight": layer.router.weight}
        for expert in range(case.experts):
            prefix = f"experts.local_experts.{expert}"
            weights[f"{prefix}.linear_fc1.weight"] = layer.experts.gate_up[expert].flatten(0, 1)
            weights[f"{prefix}.linear_fc2.weight"] = layer.experts.down[expert]
        copy_weights(theirs, weights)
        return theirs

    return build_with(case, convert)


def run_megatron_without_cuda() -> None:
    """Replaces three of its accesses to CUDA: it asks for the CUDA device of its weights, copies counts to the host on a stream
    (here they are on the host), and has no name for a product of Transformer Engine if that is not installed."""
    moe = "megatron.core.transformer.moe"
    dispatcher: Any = import_module(f"{moe}.token_dispatcher").MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = ()
    dispatcher._maybe_dtoh_and_synchronize = lambda self, point, counts_E=None: counts_E
    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    vars(import_module(f"{moe}.moe_utils")).setdefault("te_general_gemm", None)


def build_deepspeed(case: Case, variant: str) -> Built:
    """DeepSpeed's MoE layer, with our feed-forwards as its experts; `variant`: drops, or empty."""
    deepspeed, moe = import_module("deepspeed"), import_module("deepspeed.moe.layer")
    join_alone()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile this first; one process does not need it
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def convert(layer: MoELayer) -> nn.Module:
        theirs = moe.MoE(
            hidden_size=case.width,
            expert=FeedForward(case.width, case.hidden, DTYPES[case.precision]),
            num_experts=case.experts,
            k=case.top_k,
            capacity_factor=CAPACITY,
            drop_tokens=variant == "drops",
            top2_2nd_expert_sampling=False,
        )
        theirs.set_deepspeed_parallelism()
        theirs.to(DTYPES[case.precision])
        weights: dict[str, Any] = {"gate.wg.weight": layer.router.weight}
        for expert in range(case.experts):
            prefix = f"experts.deepspeed_experts.{expert}"
            weights[f"{prefix}.gate_up"] = layer.experts.gate_up[expert]
            weights[f"{prefix}.down"] = layer.experts.down[expert]
        copy_weights(theirs.deepspeed_moe, weights)
        return theirs

    return build_with(case, convert)


def copy_weights(module: nn.Module, weights: dict[str, Any]) -> None:
    """Copies these tensors into the parameters of the given names."""
    with torch.no_grad():
        for name, weight in weights.items():
            module.get_parameter(name).copy_(weight)


def join_alone() -> None:
    """Makes a process group of this process alone, if there is none."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
