"""What a family's table holds, and the keys that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...moe.config import Activation, ModelConfig, Scope
from ..config_reader import Keys
from ..weight_mapping import Row

IRRELEVANT = frozenset(
    (
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "auto_map",  # the code it names is never run
        "dtype",  # each tensor says its own
        "torch_dtype",
        "use_cache",
        "output_router_logits",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "pretraining_tp",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
)
"""Keys that decide nothing about the model's function."""


@dataclass(frozen=True)
class Family:
    """An architecture. `read` leaves no key unread that decides something; `write` is complete together with `defaults`."""

    architecture: str
    model_type: str
    defaults: dict[str, Any]
    """Every key that transformers writes, with what it means where it is left out."""
    read: Callable[[Keys], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: dict[str, Row]
    """From our names within a layer to theirs."""
    irrelevant: frozenset[str] = frozenset()
    """Keys that decide nothing here, besides IRRELEVANT."""


COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "pad_token_id": None,
    "rope_parameters": None,
    "tie_word_embeddings": False,
    "use_cache": True,
}
ROUTED: dict[str, Any] = {"output_router_logits": False, "router_aux_loss_coef": 0.001}


def read_common(keys: Keys) -> ModelConfig:
    """The model's sizes; no experts, grouped-query attention."""
    keys.require("hidden_act", "silu")
    keys.require("attention_dropout", None, 0, why="there is no dropout")
    config = ModelConfig(
        layers=keys.integer("num_hidden_layers"),
        width=keys.integer("hidden_size"),
        heads=keys.integer("num_attention_heads"),
        kv_heads=keys.optional_integer("num_key_value_heads") or keys.integer("num_attention_heads"),
        hidden=keys.integer("intermediate_size"),
        activation=Activation.swiglu,
        vocabulary=keys.integer("vocab_size"),
        tie_embeddings=keys.flag("tie_word_embeddings"),
        norm_epsilon=keys.number("rms_norm_eps"),
        init_std=keys.number("initializer_range"),
    )
    config.moe.experts = 0
    config.moe.z_coefficient = 0.0
    return config


def write_common(config: ModelConfig) -> dict[str, Any]:
    """What `read_common` reads."""
    return {
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.hidden,
        "vocab_size": config.vocabulary,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        "initializer_range": config.init_std,
    }


def read_head_width(keys: Keys, config: ModelConfig) -> None:
    """Null (or no such key) is width / heads."""
    config.head_width = keys.optional_integer("head_dim")
    if config.head_width is None and config.width % config.heads:
        raise keys.wrong("num_attention_heads", f"must divide hidden_size={config.width}, or head_dim be given")


def head_width(config: ModelConfig) -> int:
    """Width of one attention head."""
    return config.head_width or config.width // config.heads


def read_attention_bias(keys: Keys, config: ModelConfig) -> None:
    """One key for all four projections."""
    config.attention.qkv_bias = config.attention.output_bias = keys.flag("attention_bias")


# Keys about experts, and which layers have experts or a window, as several families have them.


def read_experts(keys: Keys, config: ModelConfig, experts: str, hidden: str) -> None:
    """`experts` and `hidden` are the family's keys for their number and width."""
    moe = config.moe
    moe.experts, moe.top_k, moe.hidden = keys.integer(experts), keys.integer("num_experts_per_tok"), keys.integer(hidden)
    if moe.top_k > moe.experts:
        raise keys.wrong("num_experts_per_tok", f"must be at most {experts}={moe.experts}")


def read_auxiliary(keys: Keys, config: ModelConfig) -> None:
    """Their load-balance loss is top_k times ours: it counts the choices of a token, ours each choice."""
    balance = config.moe.balance
    balance.coefficient = float(f"{keys.number('router_aux_loss_coef') * config.moe.top_k:.12g}")
    balance.scope = Scope.batch


def auxiliary(config: ModelConfig) -> float:
    """`router_aux_loss_coef`."""
    return float(f"{config.moe.balance.coefficient / config.moe.top_k:.12g}")


def read_normalize(keys: Keys, config: ModelConfig, key: str = "norm_topk_prob") -> None:
    """With one expert a token, dividing by the sum would make its weight 1, which ours never does."""
    config.moe.router.normalize_top_k = keys.flag(key)
    refuse_one_expert(keys, config)


def normalizes(config: ModelConfig) -> bool:
    """`norm_topk_prob`."""
    return config.moe.router.normalize_top_k and config.moe.top_k > 1


def refuse_one_expert(keys: Keys, config: ModelConfig) -> None:
    if config.moe.router.normalize_top_k and config.moe.top_k == 1:
        raise keys.wrong("num_experts_per_tok", "must be at least 2 where the weights are divided by their sum")


def read_moe_layers(keys: Keys, config: ModelConfig) -> None:
    """`decoder_sparse_step` and `mlp_only_layers`, as dense_first and moe_every."""
    step, dense = keys.integer("decoder_sparse_step"), keys.any("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise keys.wrong("mlp_only_layers", "must be a list of layers")
    wanted = [(index + 1) % step == 0 and index not in dense for index in range(config.layers)]
    for every, first in product((step, *range(1, config.layers + 1)), range(config.layers + 1)):
        config.moe_every, config.dense_first = every, first
        if [config.moe_layer(index) for index in range(config.layers)] == wanted:
            return
    raise keys.wrong("mlp_only_layers", f"must with decoder_sparse_step={step} leave every n-th layer after some dense ones")


def moe_layers(config: ModelConfig) -> dict[str, object]:
    """What `read_moe_layers` reads."""
    step = config.moe_every if config.dense_first % config.moe_every == 0 else 1
    sparse = [(index + 1) % step == 0 for index in range(config.layers)]
    dense = [index for index in range(config.layers) if sparse[index] and not config.moe_layer(index)]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}


LAYER_TYPES = ("sliding_attention", "full_attention")


def read_windows(keys: Keys, config: ModelConfig, default: Callable[[int], bool]) -> None:
    """`sliding_window` in the layers that `layer_types` says, or without it `default` by index."""
    types = keys.any("layer_types")
    if types is None:
        types = ["sliding_attention" if default(index) else "full_attention" for index in range(config.layers)]
    if not isinstance(types, list) or len(types) != config.layers or not all(kind in LAYER_TYPES for kind in types):
        raise keys.wrong("layer_types", f"must be {config.layers} times {' or '.join(LAYER_TYPES)}")
    wanted = [kind == "sliding_attention" for kind in types]
    if not any(wanted):
        keys.any("sliding_window")
        return
    config.attention.window = keys.integer("sliding_window")
    for every in range(1, config.layers + 1):
        config.attention.window_every = every
        if [config.windowed_layer(index) for index in range(config.layers)] == wanted:
            return
    raise keys.wrong("layer_types", "must have the window in all layers, or in all but the last of every so many")


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`."""
    return ["sliding_attention" if config.windowed_layer(index) else "full_attention" for index in range(config.layers)]
