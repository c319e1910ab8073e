"""Keys about experts, and which layers have experts or a window, as several families have them."""

from collections.abc import Callable
from itertools import product

from ...moe.config import ModelConfig, Scope
from ..keys import Keys


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
