"""`Family`, which describes one Hugging Face architecture, and the config.json keys that several families share."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...moe.config import Activation, ModelConfig, Scope
from ..config_reader import ConfigReader
from ..weight_mapping import StoredForms

IRRELEVANT = frozenset(
    (
        "architectures",
        "model_type",
        "transformers_version",
        "_name_or_path",
        "name_or_path",
        "auto_map",  # the code that it names is never run
        "dtype",  # each tensor has its own
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
    """One Hugging Face architecture: how its config.json is read and written, and the names of its tensors."""

    architecture: str
    model_type: str
    defaults: dict[str, Any]
    """Every key that transformers writes, with the value that it has where it is left out."""
    read: Callable[[ConfigReader], ModelConfig]
    """Reads every key that decides something."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """Returns the keys that differ from `defaults`, or may."""
    tensors: dict[str, StoredForms]
    """The tensors of a layer, by our names within it."""
    irrelevant: frozenset[str] = frozenset()
    """Keys that decide nothing about the model's function, in addition to IRRELEVANT."""


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


def read_common(reader: ConfigReader) -> ModelConfig:
    """A dense model with grouped-query attention, of the sizes that all families write alike."""
    reader.require("hidden_act", "silu")
    reader.require("attention_dropout", None, 0, why="there is no dropout")
    config = ModelConfig(
        layers=reader.integer("num_hidden_layers"),
        width=reader.integer("hidden_size"),
        heads=reader.integer("num_attention_heads"),
        kv_heads=reader.optional_integer("num_key_value_heads") or reader.integer("num_attention_heads"),
        hidden=reader.integer("intermediate_size"),
        activation=Activation.swiglu,
        vocabulary=reader.integer("vocab_size"),
        tie_embeddings=reader.flag("tie_word_embeddings"),
        norm_epsilon=reader.number("rms_norm_eps"),
        init_std=reader.number("initializer_range"),
    )
    config.moe.experts = 0
    config.moe.z_coefficient = 0.0
    return config


def write_common(config: ModelConfig) -> dict[str, Any]:
    """The keys that `read_common` reads."""
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


def read_head_width(reader: ConfigReader, config: ModelConfig) -> None:
    """`head_dim`; without it the head width is width / heads."""
    config.head_width = reader.optional_integer("head_dim")
    if config.head_width is None and config.width % config.heads:
        raise reader.wrong("num_attention_heads", f"must divide hidden_size={config.width}, or head_dim be given")


def read_attention_bias(reader: ConfigReader, config: ModelConfig) -> None:
    """`attention_bias`, one key for all four projections."""
    config.attention.qkv_bias = config.attention.output_bias = reader.flag("attention_bias")


# Keys about experts, and about which layers have experts or a window.


def read_experts(reader: ConfigReader, config: ModelConfig, experts: str, hidden: str) -> None:
    """Number, top-k and width of the experts; `experts` and `hidden` are the family's keys for number and width."""
    moe = config.moe
    moe.experts, moe.top_k, moe.hidden = reader.integer(experts), reader.integer("num_experts_per_tok"), reader.integer(hidden)
    if moe.top_k > moe.experts:
        raise reader.wrong("num_experts_per_tok", f"must be at most {experts}={moe.experts}")


def read_router_aux_loss_coef(reader: ConfigReader, config: ModelConfig) -> None:
    """`router_aux_loss_coef`. transformers' load-balance loss is top_k times ours: it averages over tokens, ours over choices."""
    balance = config.moe.balance
    balance.coefficient = float(f"{reader.number('router_aux_loss_coef') * config.moe.top_k:.12g}")
    balance.scope = Scope.batch


def router_aux_loss_coef(config: ModelConfig) -> float:
    """`router_aux_loss_coef`."""
    return float(f"{config.moe.balance.coefficient / config.moe.top_k:.12g}")


def read_norm_topk_prob(reader: ConfigReader, config: ModelConfig, key: str = "norm_topk_prob") -> None:
    """`norm_topk_prob`. Refused with one expert per token, whose weight transformers would make 1; ours keeps its probability."""
    config.moe.router.normalize_top_k = reader.flag(key)
    refuse_one_expert(reader, config)


def norm_topk_prob(config: ModelConfig) -> bool:
    """`norm_topk_prob`."""
    return config.moe.router.normalize_top_k and config.moe.top_k > 1


def refuse_one_expert(reader: ConfigReader, config: ModelConfig) -> None:
    if config.moe.router.normalize_top_k and config.moe.top_k == 1:
        raise reader.wrong("num_experts_per_tok", "must be at least 2 where the weights are divided by their sum")


def read_moe_layers(reader: ConfigReader, config: ModelConfig) -> None:
    """`decoder_sparse_step` and `mlp_only_layers`, as dense_first and moe_every."""
    step, dense = reader.integer("decoder_sparse_step"), reader.any("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise reader.wrong("mlp_only_layers", "must be a list of layers")
    wanted = [(index + 1) % step == 0 and index not in dense for index in range(config.layers)]
    for every, first in product((step, *range(1, config.layers + 1)), range(config.layers + 1)):
        config.moe_every, config.dense_first = every, first
        if [config.moe_layer(index) for index in range(config.layers)] == wanted:
            return
    raise reader.wrong("mlp_only_layers", f"must with decoder_sparse_step={step} leave every n-th layer after some dense ones")


def write_moe_layers(config: ModelConfig) -> dict[str, object]:
    """The keys that `read_moe_layers` reads."""
    step = config.moe_every if config.dense_first % config.moe_every == 0 else 1
    sparse = [(index + 1) % step == 0 for index in range(config.layers)]
    dense = [index for index in range(config.layers) if sparse[index] and not config.moe_layer(index)]
    return {"decoder_sparse_step": step, "mlp_only_layers": dense}


LAYER_TYPES = ("sliding_attention", "full_attention")


def read_sliding_window(reader: ConfigReader, config: ModelConfig, default: Callable[[int], bool]) -> None:
    """`sliding_window` in the layers that `layer_types` lists, or without it in those for whose index `default` is true."""
    types = reader.any("layer_types")
    if types is None:
        types = ["sliding_attention" if default(index) else "full_attention" for index in range(config.layers)]
    if not isinstance(types, list) or len(types) != config.layers or not all(kind in LAYER_TYPES for kind in types):
        raise reader.wrong("layer_types", f"must be {config.layers} times {' or '.join(LAYER_TYPES)}")
    wanted = [kind == "sliding_attention" for kind in types]
    if not any(wanted):
        reader.any("sliding_window")
        return
    config.attention.window = reader.integer("sliding_window")
    for every in range(1, config.layers + 1):
        config.attention.window_every = every
        if [config.windowed_layer(index) for index in range(config.layers)] == wanted:
            return
    raise reader.wrong("layer_types", "must have the window in all layers, or in all but the last of every so many")


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`."""
    return ["sliding_attention" if config.windowed_layer(index) else "full_attention" for index in range(config.layers)]
