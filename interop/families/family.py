"""`Family`, which describes one Hugging Face architecture, and the config.json keys that several families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...moe.config import Activation, ModelConfig, Scope
from ..config_reader import ConfigReader
from ..weight_mapping import FormsOfModel, StoredForms


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
    tensors: Mapping[str, StoredForms | FormsOfModel]
    """The tensors of a layer, by our names within it."""
    irrelevant: frozenset[str] = frozenset()
    """Keys that decide nothing about the model's function, in addition to IRRELEVANT of families/harmless.py."""
    left_out: str = ""
    """Regular expression of tensors that a folder may hold and that decide nothing about the model's function."""
    idle: Callable[[ModelConfig], dict[str, str]] = lambda _: {}
    """Tensors that transformers has and never uses, each with one of its shape, whose values an export gives it."""
    preset: str = ""
    """The model of conf/model with the published balance, where config.json and transformers say nothing of it."""

    @property
    def training_note(self) -> str:
        """A sentence about what the import takes for the balance, if config.json does not say it."""
        return f"config.json has no loss coefficients: the balance is that of model={self.preset}" if self.preset else ""


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


def read_common(reader: ConfigReader, layers: str = "num_hidden_layers", hidden: str = "intermediate_size") -> ModelConfig:
    """A dense model with grouped-query attention, of the sizes that families write alike; `layers` and `hidden` are keys."""
    reader.require("hidden_act", "silu")
    reader.require("attention_dropout", None, 0, why="there is no dropout")
    config = ModelConfig(
        layers=reader.integer(layers),
        width=reader.integer("hidden_size"),
        heads=reader.integer("num_attention_heads"),
        kv_heads=reader.optional_integer("num_key_value_heads") or reader.integer("num_attention_heads"),
        hidden=reader.integer(hidden),
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
    """`head_dim`; without it the head width is width / heads, rounded down as in transformers."""
    config.head_width = reader.optional_integer("head_dim")
    if config.head_width is None and config.width % config.heads:
        if config.width < config.heads:
            raise reader.wrong("num_attention_heads", f"must be at most hidden_size={config.width}, or head_dim be given")
        config.head_width = config.width // config.heads


def read_attention_bias(reader: ConfigReader, config: ModelConfig) -> None:
    """`attention_bias`, one key for all four projections."""
    config.attention.qkv_bias = config.attention.output_bias = reader.flag("attention_bias")


# Keys about experts, and about which layers have experts or a window.


def read_experts(reader: ConfigReader, config: ModelConfig, experts: str, hidden: str, top_k: str = "num_experts_per_tok") -> None:
    """Number, top-k and width of the experts; `experts`, `hidden` and `top_k` are the family's keys for them."""
    moe = config.moe
    moe.experts, moe.top_k, moe.hidden = reader.integer(experts), reader.integer(top_k), reader.integer(hidden)
    if moe.top_k > moe.experts:
        raise reader.wrong(top_k, f"must be at most {experts}={moe.experts}")


def read_router_aux_loss_coef(reader: ConfigReader, config: ModelConfig) -> None:
    """`router_aux_loss_coef`, the factor of one loss of all MoE layers together (transformers' load_balancing_loss_func).

    Its loss is top_k times ours: it averages over tokens, ours over choices.
    """
    balance = config.moe.balance
    balance.coefficient = float(f"{reader.number('router_aux_loss_coef') * config.moe.top_k:.12g}")
    balance.scope, balance.pool_layers = Scope.batch, True


def router_aux_loss_coef(config: ModelConfig) -> float:
    """`router_aux_loss_coef`; for losses of each layer that with which transformers' is their sum, if their loads are equal."""
    losses = 1 if config.moe.balance.pool_layers else sum(config.moe_layer(index) for index in range(config.layers))
    return float(f"{config.moe.balance.coefficient * losses / config.moe.top_k:.12g}")


def read_norm_topk_prob(reader: ConfigReader, config: ModelConfig, key: str = "norm_topk_prob") -> None:
    """`norm_topk_prob`."""
    normalize_top_k(config, reader.flag(key))


def normalize_top_k(config: ModelConfig, wanted: bool) -> None:
    """Divides the weights of a token by their sum, also of a single expert, whose weight is then 1."""
    config.moe.router.normalize_top_k, config.moe.router.normalize_one = wanted, wanted and config.moe.top_k == 1


def norm_topk_prob(config: ModelConfig) -> bool:
    """`norm_topk_prob`."""
    router = config.moe.router
    return router.normalize_top_k and (config.moe.top_k > 1 or router.normalize_one)


def set_moe_layers(config: ModelConfig, wanted: list[bool], step: int = 1) -> None:
    """Sets dense_first, moe_every (`step`, if that is possible) and dense_layers such that the layers `wanted` have experts."""
    sparse = [index for index, wants in enumerate(wanted) if wants]
    config.dense_first, config.moe_every, config.dense_layers = config.layers, step, []
    if not sparse:
        return
    for every in (step, sparse[1] - sparse[0] if len(sparse) > 1 else 1, 1):
        config.dense_first, config.moe_every, config.dense_layers = max(0, sparse[0] - every + 1), every, []
        if [config.moe_layer(index) for index in range(config.layers)] == wanted:
            return
    config.dense_layers = [index for index in range(sparse[0], config.layers) if not wanted[index]]


def read_moe_layers(reader: ConfigReader, config: ModelConfig) -> None:
    """`decoder_sparse_step` and `mlp_only_layers`."""
    step, dense = reader.integer("decoder_sparse_step"), reader.any("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(index) is int for index in dense):
        raise reader.wrong("mlp_only_layers", "must be a list of layers")
    listed = set(dense)
    set_moe_layers(config, [(index + 1) % step == 0 and index not in listed for index in range(config.layers)], step)


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
    attention = config.attention
    attention.window = reader.integer("sliding_window")
    attention.window_every = 1 if all(wanted) else wanted.index(False) + 1
    if [config.windowed_layer(index) for index in range(config.layers)] != wanted:
        attention.window_every, attention.full_layers = 1, [index for index, window in enumerate(wanted) if not window]


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types`."""
    return [
        "linear_attention"
        if config.linear_layer(index)
        else "sliding_attention"
        if config.windowed_layer(index)
        else "full_attention"
        for index in range(config.layers)
    ]
