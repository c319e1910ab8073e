"""transformers' MixtralForCausalLM, whole, with our first weights."""

from importlib import import_module

import torch
from torch import Tensor

from .cases import Case
from .ours import DTYPES, Built, transformer

OUTSIDE = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
INSIDE = {
    "attention_norm.weight": "input_layernorm.weight",
    "feedforward_norm.weight": "post_attention_layernorm.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
} | {f"attention.{name}.weight": f"self_attn.{name}_proj.weight" for name in "qkvo"}
"""From our names to theirs, within a layer."""


def build(case: Case, variant: str) -> Built:
    """`variant` is the implementation of the experts."""
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
    copy_weights({name: weight.detach() for name, weight in ours.named_parameters()}, dict(model.named_parameters()))

    def loss(ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        return model(input_ids=ids_BS, labels=ids_BS).loss  # which makes the same targets of them

    return Built(model, loss)


def copy_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """All of them; gate and up, one tensor (E, 2, F, D) of ours, are (E, 2 * F, D) there."""
    for name, weight in ours.items():
        place = theirs.pop(their_name(name))
        with torch.no_grad():
            place.copy_(weight.view(place.shape))
    assert not theirs, f"without a weight of ours: {sorted(theirs)}"


def their_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, index, inside = name.split(".", 2)
    return f"model.layers.{index}.{INSIDE[inside]}"
