"""Maps config.json to ModelConfig and back."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

from ..checkpoint.bounded import brief
from ..checkpoint.facts import check_model_numbers
from ..moe.config import AttentionKind, ModelConfig, RopeScaling
from ..moe.param_shapes import head_width, rotary_width
from ..train.config.serialize import plain_config
from .config_reader import ConfigReader
from .families import FAMILIES, Family
from .families.harmless import IRRELEVANT, harmless
from .language_model import language_config

# The settings of a ModelConfig that decide the function of the trained model: with equal ones the same weights compute the same.

TRAINING = (
    "model.mtp_coefficient",
    "model.mtp_after_norm",
    "model.dropout",
    "model.moe.dropout",
    "model.moe.balance.",
    "model.moe.z_coefficient",
    "model.moe.z_schedule",
    "model.moe.capacity.factor",
    "model.moe.capacity.minimum",
    "model.moe.capacity.scope",
    "model.moe.capacity.groups",
    "model.moe.capacity.policy",
    "model.moe.capacity.pad",
    "model.moe.capacity.schedule",
    "model.moe.router.jitter",
)
"""Settings that only training uses, or the beginnings of their names."""

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
    RopeScaling.dynamic: ("factor", "original_length"),
    RopeScaling.longrope: ("factor", "original_length", "attention_factor", "short_factors", "long_factors"),
    RopeScaling.llama3: ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
}
"""The settings of rope that each scaling uses, in addition to theta, fraction and interleaved."""


def architecture_key(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide the model's function, by key: without those of training and those without effect here."""
    without_effect = tuple(f"model.{name}" for name in _without_effect(config))
    found = {key: value for key, value in _leaves(config, "model") if not key.startswith(TRAINING + without_effect)}
    if config.attention.kind is AttentionKind.mla:
        found["model.attention.mla.norm_epsilon"] = config.attention.mla.norm_epsilon or config.norm_epsilon
    if config.attention.kind is AttentionKind.gqa:
        found["model.attention.scale"] = config.attention.scale or head_width(config) ** -0.5
        found["model.head_width"] = config.head_width or config.width // config.heads
    if config.moe.top_k == 1 and not config.moe.router.softmax_after_top_k:
        found["model.moe.router.normalize_one"] = config.moe.router.normalize_top_k and config.moe.router.normalize_one
    layers = range(config.layers)
    # As lists of layers, since different settings may mean the same ones.
    found["model.moe_every"] = [index for index in layers if config.moe_layer(index)]
    found["model.attention.linear_every"] = [index for index in layers if config.linear_layer(index)]
    if config.attention.window is not None:
        found["model.attention.window_every"] = [index for index in layers if config.windowed_layer(index)]
    # Only training uses the rate, but with any rate above 0 the router has a bias.
    found["model.moe.balance.bias_rate"] = bool(found["model.moe_every"]) and config.moe.balance.bias_rate > 0
    return found


def differences(wanted: ModelConfig, expressed: ModelConfig) -> dict[str, Any]:
    """The settings in which the two differ, with the values of `wanted`."""
    ours, theirs = architecture_key(wanted), architecture_key(expressed)
    return {key: ours.get(key) for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)}


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    for field in fields(node):
        value, inside = getattr(node, field.name), f"{key}.{field.name}"
        yield from _leaves(value, inside) if is_dataclass(value) else [(inside, value)]


def _without_effect(config: ModelConfig) -> Iterator[str]:
    """Settings, or the beginnings of their names, that have no effect with the values of the others."""
    moe, router, attention = config.moe, config.moe.router, config.attention
    sparse = sum(config.moe_layer(index) for index in range(config.layers))
    yield from ("dense_first", "moe_every", "dense_layers", "attention.full_layers", "attention.linear_layers")
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
    if router.softmax_after_top_k or moe.top_k > 1:
        yield "moe.router.normalize_one"
    yield from ("kv_heads", "head_width") if attention.kind is AttentionKind.mla else ("attention.mla.",)
    if attention.window is None:
        yield "attention.window_every"
    if not any(config.linear_layer(index) for index in range(config.layers)):
        yield "attention.delta."
    rope = attention.rope
    used = ("theta", "fraction", "interleaved", "scaling", *ROPE[rope.scaling])
    yield from (f"attention.rope.{field.name}" for field in fields(rope) if field.name not in used)


def family_of(config: dict[str, Any], place: str = "config.json: ") -> Family:
    """The family that `architectures`, or without it `model_type`, names. Raises ValueError if it is none of FAMILIES."""
    names = config.get("architectures") or [
        family.architecture for family in FAMILIES.values() if family.model_type == config.get("model_type")
    ]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(FAMILIES):
        key = "architectures" if config.get("architectures") else "model_type"
        raise ValueError(f"{place}{key}={brief(config.get(key))}: must be one of {', '.join(FAMILIES)}")
    return FAMILIES[names[0]]


def read_config(config: dict[str, Any], place: str = "config.json: ") -> tuple[Family, ModelConfig]:
    """The family and the model that a config.json describes. ValueError, one line, for a key or value without equivalent here."""
    config = language_config(config, place)
    family = family_of(config, place)
    if config.get("quantization_config"):
        _check_quantization(config["quantization_config"], family, place)
    reader = ConfigReader(config, family.defaults, place)
    model = family.read(reader)
    rope, pairs = model.attention.rope, rotary_width(model) // 2
    if rope.scaling is RopeScaling.longrope and {len(rope.short_factors), len(rope.long_factors)} != {pairs}:
        factors = rope.short_factors if len(rope.short_factors) != pairs else rope.long_factors
        name = "short_factor" if factors is rope.short_factors else "long_factor"
        key = f"{'rope_scaling' if config.get('rope_scaling') else 'rope_parameters'}.{name}"
        raise ValueError(f"{place}{key}={brief(factors)}: must be a list of {pairs} numbers, one for each rotated pair of a head")
    if rope.scaling is RopeScaling.dynamic and pairs < 2:
        raise ValueError(f"{place}rope_parameters.rope_type='dynamic': needs two rotated pairs of a head")
    check_model_numbers({"model": plain_config(model)})
    reader.finish(IRRELEVANT | family.irrelevant | {"quantization_config"}, harmless(model))
    return family, model


def _check_quantization(about: Any, family: Family, place: str) -> None:
    """Raises ValueError, one line, unless quantized.py reads what `quantization_config` describes."""
    method = about.get("quant_method") if isinstance(about, dict) else about
    blocks = about.get("weight_block_size") if isinstance(about, dict) else None
    if not (method == "mxfp4" and family.model_type == "gpt_oss") and not (method == "fp8" and blocks == [128, 128]):
        with_blocks = f" with weight_block_size={brief(blocks)}" if method == "fp8" else ""
        raise ValueError(
            f"{place}quantization_config.quant_method={brief(method)}{with_blocks}: must be 'fp8' with "
            "weight_block_size=[128, 128], or 'mxfp4' of GptOssForCausalLM; other weights must be bf16, fp16, fp32 or fp64"
        )
    reader = ConfigReader(about, {}, f"{place}quantization_config.")
    reader.require("fmt", None, "e4m3", "float8_e4m3fn")
    reader.require("activation_scheme", None, "dynamic")
    reader.require("scale_fmt", None, "float", "ue8m0")
    reader.require("expert_dtype", None, "fp8")
    names = ("modules_to_convert", "modules_to_not_convert", "ignored_layers", "dequantize")  # the tensors show which are
    reader.finish(("quant_method", "weight_block_size", *names), {})


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """A complete config.json. Raises ValueError, naming the first setting that the architecture cannot express."""
    if different := inexpressible(family, model):
        key, value = next(iter(different.items()))
        raise ValueError(f"{key}={_shown(value)}: {family.architecture} cannot express it")
    return _written(family, model)


def choose_family(model: ModelConfig, first: str | None = None) -> Family:
    """The first architecture that can express the model; `first` is tried first.

    Raises ValueError, naming the settings that the nearest one cannot express.
    """
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
    """The settings, with their values, that are lost in this architecture's config.json: found by writing and reading it.

    Raises ValueError for a value that the architecture's own rules refuse.
    """
    _, expressed = read_config(_written(family, model), f"{family.architecture} cannot express the model: ")
    return differences(model, expressed)


def _written(family: Family, model: ModelConfig) -> dict[str, Any]:
    """config.json, without what the architecture has no keys for."""
    written = {"architectures": [family.architecture], "model_type": family.model_type} | family.defaults | family.write(model)
    rope = model.attention.rope
    return written | ({"max_position_embeddings": rope.original_length} if rope.scaling is RopeScaling.dynamic else {})


def _shown(value: Any) -> str:
    return str(getattr(value, "name", value))
