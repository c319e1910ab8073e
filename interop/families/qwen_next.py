"""Qwen3-Next (Qwen Team 2025) and the language model of Qwen3.5-MoE (2026): gated DeltaNet beside gated attention.

Their files hold the same parts in other tensors: Qwen3-Next all projections of a head of keys together, Qwen3.5 those of all heads.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ...moe.config import ModelConfig, QKNorm
from ...moe.param_shapes import head_width
from ..config_reader import ConfigReader
from ..rope import Partial, read_rope, write_rope
from ..weight_mapping import (
    DENSE,
    NORMS,
    ROUTER,
    FormsOfModel,
    RowRange,
    Source,
    StoredForms,
    experts,
    feedforward,
    layer_tensors,
    same,
)
from .family import (
    COMMON,
    ROUTED,
    Family,
    layer_types,
    norm_topk_prob,
    normalize_top_k,
    read_attention_bias,
    read_common,
    read_experts,
    read_moe_layers,
    read_norm_topk_prob,
    read_router_aux_loss_coef,
    router_aux_loss_coef,
    write_common,
    write_moe_layers,
)

if TYPE_CHECKING:
    from torch import Tensor

LAYER_TYPES = ("linear_attention", "full_attention")
INTERVAL = 4
"""full_attention_interval, where it is left out: it is not in what transformers writes."""
FRACTION = 0.25
"""partial_rotary_factor, where it is left out."""


def read_next(reader: ConfigReader) -> ModelConfig:
    config = _read(reader)
    read_norm_topk_prob(reader, config)
    read_moe_layers(reader, config)
    return config


def write_next(config: ModelConfig) -> dict[str, Any]:
    return _written(config) | write_moe_layers(config) | {"norm_topk_prob": norm_topk_prob(config)}


def read_3_5(reader: ConfigReader) -> ModelConfig:
    config = _read(reader)
    normalize_top_k(config, True)
    return config


def write_3_5(config: ModelConfig) -> dict[str, Any]:
    return _written(config)


def _read(reader: ConfigReader) -> ModelConfig:
    """What both have."""
    config = read_common(reader)
    config.head_width, config.zero_centered_norms = reader.integer("head_dim"), True
    read_experts(reader, config, "num_experts", "moe_intermediate_size")
    read_router_aux_loss_coef(reader, config)
    config.moe.shared_hidden, config.moe.shared_gate = reader.integer("shared_expert_intermediate_size", 0), True
    read_attention_bias(reader, config)
    config.attention.qk_norm, config.attention.output_gate = QKNorm.head, True
    config.attention.rope = read_rope(reader, partial=Partial(config.head_width, FRACTION))
    _read_layer_types(reader, config)
    delta = config.attention.delta
    delta.key_heads, delta.value_heads = reader.integer("linear_num_key_heads"), reader.integer("linear_num_value_heads")
    delta.key_width, delta.value_width = reader.integer("linear_key_head_dim"), reader.integer("linear_value_head_dim")
    delta.kernel = reader.integer("linear_conv_kernel_dim")
    if delta.value_heads % delta.key_heads:
        raise reader.wrong("linear_num_value_heads", f"must be a multiple of linear_num_key_heads={delta.key_heads}")
    return config


def _read_layer_types(reader: ConfigReader, config: ModelConfig) -> None:
    """`layer_types`, or without it `full_attention_interval`."""
    types = reader.any("layer_types")
    interval = reader.integer("full_attention_interval") if reader.given("full_attention_interval") else INTERVAL
    if types is None:
        types = [LAYER_TYPES[(index + 1) % interval == 0] for index in range(config.layers)]
    if not isinstance(types, list) or len(types) != config.layers or not all(kind in LAYER_TYPES for kind in types):
        raise reader.wrong("layer_types", f"must be {config.layers} times {' or '.join(LAYER_TYPES)}")
    wanted, attention = [kind == "linear_attention" for kind in types], config.attention
    attention.linear_every = wanted.index(False) + 1 if False in wanted else config.layers + 1
    if [config.linear_layer(index) for index in range(config.layers)] != wanted:
        attention.linear_every, attention.linear_layers = 1, [index for index, linear in enumerate(wanted) if linear]


def _written(config: ModelConfig) -> dict[str, Any]:
    attention, delta, moe = config.attention, config.attention.delta, config.moe
    return write_common(config) | {
        "head_dim": head_width(config),
        "num_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "shared_expert_intermediate_size": moe.shared_hidden,
        "router_aux_loss_coef": router_aux_loss_coef(config),
        "attention_bias": attention.qkv_bias,
        "rope_parameters": write_rope(attention.rope) | {"partial_rotary_factor": attention.rope.fraction},
        "layer_types": layer_types(config),
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_width,
        "linear_value_head_dim": delta.value_width,
        "linear_conv_kernel_dim": delta.kernel,
    }


# The names of the tensors. Those of attention depend on the kind of the layer.

FULL = "model.layers.{layer}.self_attn."
LINEAR = "model.layers.{layer}.linear_attn."


def _tensors(linear: dict[str, FormsOfModel]) -> Mapping[str, StoredForms | FormsOfModel]:
    """The tensors of a layer; `linear`: those of gated DeltaNet in which the two families differ."""
    both = {
        "dt_bias": same(f"{LINEAR}dt_bias"),
        "a_log": same(f"{LINEAR}A_log"),
        "output_norm.weight": same(f"{LINEAR}norm.weight"),
        "o.weight": same(f"{LINEAR}out_proj.weight"),
        **{f"{name}_conv.weight": partial(_convolution, "qkv".index(name)) for name in "qkv"},
    }
    full = {f"{name}.{kind}": same(f"{FULL}{name}_proj.{kind}") for name in ("k", "v", "o") for kind in ("weight", "bias")}
    full |= {f"{name}.weight": same(f"{FULL}{name}.weight") for name in ("q_norm", "k_norm")}
    gated = {
        f"{name}.{kind}": partial(_gated_query, place, kind)
        for place, name in enumerate(("q", "gate"))
        for kind in ("weight", "bias")
    }
    of_linear, of_full = both | linear, full | gated
    attention = {f"attention.{name}": partial(_of_layer, of_linear.get(name), of_full.get(name)) for name in of_linear | of_full}
    gate = layer_tensors({"moe.shared_gate.weight": "mlp.shared_expert_gate.weight"})
    return NORMS | attention | DENSE | ROUTER | experts() | feedforward("moe.shared", "mlp.shared_expert") | gate


def _of_layer(
    linear: StoredForms | FormsOfModel | None, full: StoredForms | FormsOfModel | None, config: ModelConfig, layer: int
) -> StoredForms:
    forms = linear if config.linear_layer(layer) else full
    assert forms is not None, f"layer {layer} has no such tensor"
    return forms(config, layer) if callable(forms) else forms


def _gated_query(place: int, kind: str, config: ModelConfig, _layer: int) -> StoredForms:
    """Each head has its queries and then its gates."""
    return _by_heads(f"{FULL}q_proj.{kind}", config.heads, [head_width(config)] * 2, place)


def _joined_projection(place: int, config: ModelConfig, _layer: int) -> StoredForms:
    """Each head of keys has its query, its key, and the values and then the gates of its heads of values (Qwen3-Next)."""
    delta = config.attention.delta
    values = delta.value_heads // delta.key_heads * delta.value_width
    return _by_heads(f"{LINEAR}in_proj_qkvz.weight", delta.key_heads, [delta.key_width] * 2 + [values] * 2, place)


def _joined_rates(place: int, config: ModelConfig, _layer: int) -> StoredForms:
    """The same for beta and decay."""
    delta = config.attention.delta
    return _by_heads(f"{LINEAR}in_proj_ba.weight", delta.key_heads, [delta.value_heads // delta.key_heads] * 2, place)


def _beside(place: int, config: ModelConfig, _layer: int) -> StoredForms:
    """All queries, all keys, all values (Qwen3.5)."""
    return _by_heads(f"{LINEAR}in_proj_qkv.weight", 1, _channels(config), place)


def _convolution(place: int, config: ModelConfig, _layer: int) -> StoredForms:
    (source,), *_ = _by_heads(f"{LINEAR}conv1d.weight", 1, _channels(config), place)
    return ((source._replace(view=lambda weight_CK: weight_CK.unsqueeze(1)),),)


def _channels(config: ModelConfig) -> list[int]:
    """The rows of queries, keys and values of all heads of gated DeltaNet."""
    delta = config.attention.delta
    return [delta.key_heads * delta.key_width] * 2 + [delta.value_heads * delta.value_width]


def _by_heads(name: str, heads: int, widths: Sequence[int], place: int) -> StoredForms:
    """One of several tensors of ours, of which `name` has widths[0], widths[1], ... rows for each of the heads in turn."""
    width, before, each = widths[place], sum(widths[:place]), sum(widths)
    rows = (RowRange(head * each + before, heads * each) for head in range(heads))
    return (tuple(Source(name, partial(_rows, head * width, width), rows=held) for head, held in enumerate(rows)),)


def _rows(begin: int, number: int, ours: "Tensor") -> "Tensor":
    return ours[begin : begin + number]


HYBRID: dict[str, Any] = (
    COMMON
    | ROUTED
    | {
        "attention_bias": False,
        "head_dim": 256,
        "hidden_size": 2048,
        "layer_types": None,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 32768,
        "moe_intermediate_size": 512,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "shared_expert_intermediate_size": 512,
    }
)

QWEN3_NEXT = Family(
    architecture="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    defaults=HYBRID
    | {
        "decoder_sparse_step": 1,
        "intermediate_size": 5632,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "vocab_size": 151936,
    },
    read=read_next,
    write=write_next,
    tensors=_tensors(
        {f"{name}.weight": partial(_joined_projection, place) for place, name in enumerate(("q", "k", "v", "gate"))}
        | {f"{name}.weight": partial(_joined_rates, place) for place, name in enumerate(("beta", "decay"))}
    ),
    left_out=r"mtp\..*",
)

QWEN3_5_MOE = Family(
    architecture="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    defaults=HYBRID
    | {
        "intermediate_size": 512,  # of dense layers, which there are none of
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "vocab_size": 248320,
    },
    read=read_3_5,
    write=write_3_5,
    tensors=_tensors(
        {f"{name}.weight": partial(_beside, place) for place, name in enumerate(("q", "k", "v"))}
        | {
            f"{ours}.weight": lambda _config, _layer, theirs=theirs: same(f"{LINEAR}in_proj_{theirs}.weight")
            for ours, theirs in {"gate": "z", "beta": "b", "decay": "a"}.items()
        }
    ),
    left_out=r"(mtp|model\.visual)\..*",
)
