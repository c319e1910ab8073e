"""Rotary embeddings in config.json: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`."""

from typing import Any

from ..moe.config import RopeConfig, RopeScaling
from .config_reader import ConfigReader

TYPES = {
    "default": RopeScaling.none,
    "linear": RopeScaling.linear,
    "yarn": RopeScaling.yarn,
    "llama3": RopeScaling.llama3,
}


def read_rope(reader: ConfigReader, theta: float = 10000.0, mscale: bool = False, interleaved: bool = False) -> RopeConfig:
    """Rotary settings of a config.json. `theta` is the family's default; `mscale`: the family uses DeepSeek's mscale factors."""
    group = "rope_scaling" if reader.any("rope_scaling") else "rope_parameters"
    given = {"rope_theta": reader.any("rope_theta") if reader.given("rope_theta") else theta}
    given |= {key: value for key, value in reader.mapping(group).items() if value is not None}
    kind = given.pop("rope_type", None) or given.get("type") or "default"
    given["rope_type"] = kind
    rope_reader = ConfigReader(
        given, {"original_max_position_embeddings": reader.any("max_position_embeddings")}, f"{reader.place}{group}."
    )
    for place in (reader, rope_reader):
        place.require("partial_rotary_factor", None, 1)
    rope_reader.require("type", None, kind)
    if not isinstance(rope_reader.any("rope_type"), str) or kind not in TYPES:
        raise rope_reader.wrong("rope_type", f"must be one of {', '.join(TYPES)}")
    rope = RopeConfig(theta=rope_reader.number("rope_theta"), interleaved=interleaved, scaling=TYPES[kind])
    if rope.scaling is not RopeScaling.none:
        rope.factor = rope_reader.number("factor")
        if rope.factor < 1:
            raise rope_reader.wrong("factor", "must be at least 1")
    if rope.scaling in (RopeScaling.yarn, RopeScaling.llama3):
        rope.original_length = rope_reader.integer("original_max_position_embeddings")
    if rope.scaling is RopeScaling.llama3:
        rope.low_frequency_factor, rope.high_frequency_factor = (
            rope_reader.number("low_freq_factor"),
            rope_reader.number("high_freq_factor"),
        )
    if rope.scaling is RopeScaling.yarn:
        _read_yarn(rope, rope_reader, mscale)
    rope_reader.finish(())
    return rope


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Returns `rope_parameters`."""
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


def _read_yarn(rope: RopeConfig, rope_reader: ConfigReader, mscale: bool) -> None:
    for name in ("beta_fast", "beta_slow", "attention_factor"):
        if rope_reader.given(name):
            setattr(rope, name, rope_reader.number(name))
    if rope_reader.given("truncate"):
        rope.truncate = rope_reader.flag("truncate")
    if not mscale:  # transformers scales cosines and sines by them in every family, other families' authors do not
        rope_reader.require("mscale", None)
        rope_reader.require("mscale_all_dim", None)
    elif rope_reader.given("mscale") or rope_reader.given("mscale_all_dim"):
        rope.mscale, rope.mscale_all = rope_reader.number("mscale"), rope_reader.number("mscale_all_dim")
        if bool(rope.mscale) != bool(rope.mscale_all):
            raise rope_reader.wrong("mscale_all_dim", f"must be 0 if and only if mscale={rope.mscale} is")
