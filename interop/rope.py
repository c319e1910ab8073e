"""Rotary embeddings in config.json: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`."""

from typing import Any

from ..moe.config import RopeConfig, RopeScaling
from .config_reader import Keys

TYPES = {
    "default": RopeScaling.none,
    "linear": RopeScaling.linear,
    "yarn": RopeScaling.yarn,
    "llama3": RopeScaling.llama3,
}


def read_rope(keys: Keys, theta: float = 10000.0, mscale: bool = False, interleaved: bool = False) -> RopeConfig:
    """The settings that the keys of one model mean. `theta` is the family's default, `mscale` whether DeepSeek's factors apply."""
    group = "rope_scaling" if keys.any("rope_scaling") else "rope_parameters"
    given = {"rope_theta": keys.any("rope_theta") if keys.given("rope_theta") else theta}
    given |= {key: value for key, value in keys.mapping(group).items() if value is not None}
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given["rope_type"] = kind
    inside = Keys(given, {"original_max_position_embeddings": keys.any("max_position_embeddings")}, f"{keys.place}{group}.")
    for place in (keys, inside):
        place.require("partial_rotary_factor", None, 1)
    inside.require("type", None, kind)
    if not isinstance(inside.any("rope_type"), str) or kind not in TYPES:
        raise inside.wrong("rope_type", f"must be one of {', '.join(TYPES)}")
    rope = RopeConfig(theta=inside.number("rope_theta"), interleaved=interleaved, scaling=TYPES[kind])
    if rope.scaling is not RopeScaling.none:
        rope.factor = inside.number("factor")
        if rope.factor < 1:
            raise inside.wrong("factor", "must be at least 1")
    if rope.scaling in (RopeScaling.yarn, RopeScaling.llama3):
        rope.original_length = inside.integer("original_max_position_embeddings")
    if rope.scaling is RopeScaling.llama3:
        rope.low_frequency_factor, rope.high_frequency_factor = inside.number("low_freq_factor"), inside.number("high_freq_factor")
    if rope.scaling is RopeScaling.yarn:
        _read_yarn(rope, inside, mscale)
    inside.finish(())
    return rope


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters`."""
    kind = next(name for name, scaling in TYPES.items() if scaling is rope.scaling)
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": kind}
    if rope.scaling is not RopeScaling.none:
        written["factor"] = rope.factor
    if rope.scaling in (RopeScaling.yarn, RopeScaling.llama3):
        written["original_max_position_embeddings"] = rope.original_length
    if rope.scaling is RopeScaling.llama3:
        written |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    if rope.scaling is RopeScaling.yarn:
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            written["attention_factor"] = rope.attention_factor
        if rope.mscale or rope.mscale_all:
            written |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all}
    return written


def _read_yarn(rope: RopeConfig, inside: Keys, mscale: bool) -> None:
    for name in ("beta_fast", "beta_slow", "attention_factor"):
        if inside.given(name):
            setattr(rope, name, inside.number(name))
    if inside.given("truncate"):
        rope.truncate = inside.flag("truncate")
    if not mscale:  # transformers takes them for the factor of cosines and sines, the makers of other families do not
        inside.require("mscale", None)
        inside.require("mscale_all_dim", None)
    elif inside.given("mscale") or inside.given("mscale_all_dim"):
        rope.mscale, rope.mscale_all = inside.number("mscale"), inside.number("mscale_all_dim")
        if bool(rope.mscale) != bool(rope.mscale_all):
            raise inside.wrong("mscale_all_dim", f"must be 0 if and only if mscale={rope.mscale} is")
