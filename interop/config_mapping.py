"""Between config.json and ModelConfig."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from ..checkpoint.bounded import brief
from ..checkpoint.facts import check_model_numbers
from ..moe.config import AttentionKind, ModelConfig, RopeScaling
from ..train.config.serialize import plain_config
from .config_reader import Keys
from .families import FAMILIES, Family
from .families.base import IRRELEVANT

# What of a ModelConfig decides the function of the trained model: two that agree in it compute the same from the same weights.

TRAINING = (
    "model.mtp_coefficient",
    "model.moe.balance.",
    "model.moe.z_coefficient",
    "model.moe.capacity.factor",
    "model.moe.capacity.minimum",
    "model.moe.capacity.scope",
    "model.moe.capacity.policy",
    "model.moe.capacity.pad",
    "model.moe.capacity.schedule",
    "model.moe.router.jitter",
)
"""Settings of training alone."""

ROPE = {
    RopeScaling.none: (),
    RopeScaling.linear: ("factor",),
    RopeScaling.yarn: (
        "factor",
        "original_length",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all",
        "truncate",
    ),
    RopeScaling.llama3: ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
}
"""The settings of rope that each scaling uses, besides theta, fraction and interleaved."""


def essence(config: ModelConfig) -> dict[str, Any]:
    """By setting. Left out: what only training uses, and what has no effect beside the others."""
    idle = tuple(f"model.{name}" for name in _idle(config))
    found = {key: value for key, value in _leaves(config, "model") if not key.startswith(TRAINING + idle)}
    if config.attention.kind is AttentionKind.gqa:
        found["model.head_width"] = config.head_width or config.width // config.heads
    layers = range(config.layers)
    # Said in layers, as different settings may mean the same ones.
    found["model.moe_every"] = [index for index in layers if config.moe_layer(index)]
    if config.attention.window is not None:
        found["model.attention.window_every"] = [index for index in layers if config.windowed_layer(index)]
    # The rate is of training, but with it the router has a bias.
    found["model.moe.balance.bias_rate"] = bool(found["model.moe_every"]) and config.moe.balance.bias_rate > 0
    return found


def differences(wanted: ModelConfig, expressed: ModelConfig) -> dict[str, Any]:
    """The settings of `wanted` that `expressed` does not have, with their values."""
    ours, theirs = essence(wanted), essence(expressed)
    return {key: ours.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        value, inside = getattr(node, field.name), f"{key}.{field.name}"
        yield from _leaves(value, inside) if is_dataclass(value) else [(inside, value)]


def _idle(config: ModelConfig) -> Iterator[str]:
    """Settings (or the beginnings of their names) without effect beside the others."""
    moe, router, attention = config.moe, config.moe.router, config.attention
    sparse = sum(config.moe_layer(index) for index in range(config.layers))
    yield from ("dense_first", "moe_every")
    if not sparse:
        yield "moe."
    if sparse == config.layers:
        yield "hidden"
        if not moe.shared_hidden:
            yield "activation"
    if not moe.shared_hidden:
        yield "moe.shared_gate"
    if router.groups == 1:
        yield from ("moe.router.top_groups", "moe.router.group_score")
    if router.softmax_after_top_k or moe.top_k == 1:
        yield "moe.router.normalize_top_k"
    yield from ("kv_heads", "head_width") if attention.kind is AttentionKind.mla else ("attention.mla.",)
    if attention.window is None:
        yield "attention.window_every"
    rope = attention.rope
    used = ("theta", "fraction", "interleaved", "scaling", *ROPE[rope.scaling])
    yield from (f"attention.rope.{field.name}" for field in fields(rope) if field.name not in used)


def family_of(config: dict[str, Any], place: str = "config.json: ") -> Family:
    """By `architectures`, or without it `model_type`. ValueError if it is none of FAMILIES."""
    names = config.get("architectures") or [
        family.architecture for family in FAMILIES.values() if family.model_type == config.get("model_type")
    ]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        key = "architectures" if config.get("architectures") else "model_type"
        raise ValueError(f"{place}{key}={brief(config.get(key))}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[names[0]]


def read_config(config: dict[str, Any], place: str = "config.json: ") -> tuple[Family, ModelConfig]:
    """The family and what its keys mean. ValueError, one line, for a key or a value that cannot be expressed."""
    family = family_of(config, place)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise ValueError(f"{place}quantization_config.quant_method={brief(method)}: weights must be bf16, fp16, fp32 or fp64")
    keys = Keys(config, family.defaults, place)
    model = family.read(keys)
    check_model_numbers({"model": plain_config(model)})
    keys.finish(IRRELEVANT | family.irrelevant | {"quantization_config"})
    return family, model


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """A complete config.json. ValueError naming the first setting that the architecture cannot express."""
    if different := inexpressible(family, model):
        key, value = next(iter(different.items()))
        raise ValueError(f"{key}={_shown(value)}: {family.architecture} cannot express it")
    return _written(family, model)


def choose_family(model: ModelConfig, first: str | None = None) -> Family:
    """The first architecture that can express the model, `first` before the others. ValueError naming what the nearest cannot."""
    nearest: tuple[Family, dict[str, Any]] | None = None
    for family in sorted(FAMILIES.values(), key=lambda family: family.architecture != first):
        with suppress(ValueError):
            different = inexpressible(family, model)
            if not different:
                return family
            if nearest is None or len(different) < len(nearest[1]):
                nearest = family, different
    if nearest is None:
        raise ValueError(f"model: no architecture can express it; there are {', '.join(FAMILIES)}")
    settings = ", ".join(f"{key}={_shown(value)}" for key, value in nearest[1].items())
    raise ValueError(f"{settings}: no architecture can express it, the nearest is {nearest[0].architecture}")


def inexpressible(family: Family, model: ModelConfig) -> dict[str, Any]:
    """The settings that config.json would say otherwise, with their values: found by reading it again.

    ValueError for a value that the architecture's own rules refuse.
    """
    _, expressed = read_config(_written(family, model), f"{family.architecture} cannot express the model: ")
    return differences(model, expressed)


def _written(family: Family, model: ModelConfig) -> dict[str, Any]:
    """config.json as far as the architecture's keys reach."""
    return {"architectures": [family.architecture], "model_type": family.model_type} | family.defaults | family.write(model)


def _shown(value: Any) -> str:
    return str(getattr(value, "name", value))
