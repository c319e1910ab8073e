"""What a family's table holds, and the keys that all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...moe.config import Activation, ModelConfig
from ..keys import Keys
from ..names import Row

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
