"""Rotary embeddings in config.json: `rope_parameters` of transformers 5, or the older `rope_theta` and `rope_scaling`."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ..moe.config import RopeConfig, RopeScaling
from .config_reader import ConfigReader

TYPES = {
    "default": RopeScaling.none,
    "linear": RopeScaling.linear,
    "yarn": RopeScaling.yarn,
    "llama3": RopeScaling.llama3,
    "dynamic": RopeScaling.dynamic,
    "longrope": RopeScaling.longrope,
}

OF_IMAGES = ("mrope_section", "mrope_interleaved")
"""Which angles turn by height and width of an image, whose positions are equal in text."""
ORIGINAL = "original_max_position_embeddings"


class Partial(NamedTuple):
    """The rotated part of each head, for a family that may rotate only a part."""

    width: int
    """Width of a head."""
    fraction: float | None = None
    """The part, where config.json does not say it; None: all."""


def read_rope(
    reader: ConfigReader,
    theta: float = 10000.0,
    mscale: bool = False,
    interleaved: bool = False,
    partial: Partial | None = None,
    default: Mapping[str, Any] = MappingProxyType({}),
) -> RopeConfig:
    """Rotary settings of a config.json. `theta` and `default` are what the family has where they are left out.

    `mscale`: the family uses DeepSeek's mscale factors.
    """
    rope_reader = _open(reader, theta, partial, default)
    kind = rope_reader.any("rope_type")
    rope_reader.require("type", None, kind)
    if not isinstance(kind, str) or kind not in TYPES:
        raise rope_reader.wrong("rope_type", f"must be one of {', '.join(TYPES)}")
    rope = RopeConfig(theta=rope_reader.number("rope_theta"), interleaved=interleaved, scaling=TYPES[kind])
    if rope.theta <= 1:
        raise rope_reader.wrong("rope_theta", "must be above 1")
    _read_fraction(rope, rope_reader, reader, partial)
    if rope.scaling not in (RopeScaling.none, RopeScaling.longrope):
        rope.factor = rope_reader.number("factor")
        if rope.factor < 1:
            raise rope_reader.wrong("factor", "must be at least 1")
    match rope.scaling:
        case RopeScaling.dynamic:  # transformers looks at no other length
            rope.original_length = reader.integer("max_position_embeddings")
            rope_reader.require(ORIGINAL, None, rope.original_length)
        case RopeScaling.longrope:
            _read_longrope(rope, rope_reader, reader)
        case RopeScaling.llama3:
            _read_llama3(rope, rope_reader)
        case RopeScaling.yarn:
            _read_yarn(rope, rope_reader, mscale)
        case _:
            pass
    rope_reader.finish(OF_IMAGES, {})
    return rope


def _open(reader: ConfigReader, theta: float, partial: Partial | None, default: Mapping[str, Any]) -> ConfigReader:
    """A reader of `rope_parameters` or `rope_scaling`, with what stands outside of them as defaults."""
    group = "rope_scaling" if reader.any("rope_scaling") else "rope_parameters"
    given = {"rope_theta": reader.any("rope_theta") if reader.given("rope_theta") else theta}
    given |= {key: value for key, value in (reader.mapping(group) or default).items() if value is not None or key == "truncate"}
    given["rope_type"] = given.get("rope_type") or given.get("type") or "default"
    if (outside := reader.any(ORIGINAL)) is not None and given["rope_type"] in ("llama3", "yarn", "longrope"):
        given[ORIGINAL] = outside  # Phi-3 says it there, and transformers then looks nowhere else
    fraction = reader.any("partial_rotary_factor")
    if partial is not None and not reader.given("partial_rotary_factor"):
        fraction = partial.fraction
    defaults = {ORIGINAL: reader.any("max_position_embeddings"), "partial_rotary_factor": fraction}
    return ConfigReader(given, defaults, f"{reader.place}{group}.")


def _read_fraction(rope: RopeConfig, rope_reader: ConfigReader, reader: ConfigReader, partial: Partial | None) -> None:
    """`partial_rotary_factor`; transformers rounds the number of rotated dimensions down, here pairs are rotated."""
    if partial is None:
        for place in (reader, rope_reader):
            place.require("partial_rotary_factor", None, 1)
        return
    if rope_reader.any("partial_rotary_factor") is None:
        return
    fraction = rope_reader.number("partial_rotary_factor")
    rotated = int(partial.width * fraction)
    if rotated % 2 or not 2 <= rotated <= partial.width:
        raise rope_reader.wrong("partial_rotary_factor", f"must rotate an even number of the {partial.width} dimensions of a head")
    rope.fraction = rotated / partial.width


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Returns `rope_parameters`."""
    kind = next(name for name, scaling in TYPES.items() if scaling is rope.scaling)
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": kind}
    if rope.fraction != 1:
        written["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not RopeScaling.none:
        written["factor"] = rope.factor
    if rope.scaling in (RopeScaling.yarn, RopeScaling.llama3, RopeScaling.longrope):
        written[ORIGINAL] = rope.original_length
    if rope.scaling is RopeScaling.llama3:
        written |= {"low_freq_factor": rope.low_frequency_factor, "high_freq_factor": rope.high_frequency_factor}
    if rope.scaling is RopeScaling.longrope:
        written |= {"short_factor": rope.short_factors, "long_factor": rope.long_factors}
    if rope.scaling in (RopeScaling.yarn, RopeScaling.longrope) and rope.attention_factor is not None:
        written["attention_factor"] = rope.attention_factor
    if rope.scaling is RopeScaling.yarn:
        written |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.mscale or rope.mscale_all:
            written |= {"mscale": rope.mscale, "mscale_all_dim": rope.mscale_all}
    return written


def _read_llama3(rope: RopeConfig, rope_reader: ConfigReader) -> None:
    rope.original_length = rope_reader.integer(ORIGINAL)
    rope.low_frequency_factor = rope_reader.positive("low_freq_factor")
    rope.high_frequency_factor = rope_reader.positive("high_freq_factor")
    if rope.high_frequency_factor <= rope.low_frequency_factor:
        raise rope_reader.wrong("high_freq_factor", f"must be above low_freq_factor={rope.low_frequency_factor:g}")


def _read_longrope(rope: RopeConfig, rope_reader: ConfigReader, reader: ConfigReader) -> None:
    """Without `factor` it is the ratio of the lengths (Phi-3). One below 1 is 1, which changes neither angles nor their factor."""
    rope.original_length = rope_reader.integer(ORIGINAL, 2)
    if rope_reader.any("factor") is None:
        rope.factor = max(1.0, reader.integer("max_position_embeddings") / rope.original_length)
    else:
        rope.factor = max(1.0, rope_reader.number("factor"))
    if rope_reader.given("attention_factor"):
        rope.attention_factor = rope_reader.positive("attention_factor")
    rope.short_factors, rope.long_factors = (_factors(rope_reader, name) for name in ("short_factor", "long_factor"))


def _factors(reader: ConfigReader, key: str) -> list[float]:
    found = reader.any(key)
    if not isinstance(found, list) or not all(type(value) in (int, float) and 0 < value < math.inf for value in found):
        raise reader.wrong(key, "must be a list of numbers above 0, one for each rotated pair of a head")
    return [float(value) for value in found]


def _read_yarn(rope: RopeConfig, rope_reader: ConfigReader, mscale: bool) -> None:
    rope.original_length = rope_reader.integer(ORIGINAL)
    for name in ("beta_fast", "beta_slow"):
        if rope_reader.any(name):  # transformers takes 0 for the default, as null
            setattr(rope, name, rope_reader.positive(name))
    if rope.beta_fast < rope.beta_slow:
        raise rope_reader.wrong("beta_fast", f"must be at least beta_slow={rope.beta_slow:g}")
    if rope_reader.given("attention_factor"):
        rope.attention_factor = rope_reader.positive("attention_factor")
    if rope_reader.given("truncate"):
        rope.truncate = rope_reader.flag("truncate")  # null is false, and leaving it out is true
    if not (rope_reader.given("mscale") or rope_reader.given("mscale_all_dim")):
        return
    both = [rope_reader.number(name) if rope_reader.given(name) else 0.0 for name in ("mscale", "mscale_all_dim")]
    if min(both) < 0:
        raise rope_reader.wrong("mscale" if both[0] < 0 else "mscale_all_dim", "must be at least 0")
    if mscale:
        rope.mscale, rope.mscale_all = both
        if bool(rope.mscale) != bool(rope.mscale_all):
            raise rope_reader.wrong("mscale_all_dim", f"must be 0 if and only if mscale={rope.mscale} is")
    elif all(both) and rope.attention_factor is None:
        # Outside of DeepSeek they scale cosines and sines alone, and only together.
        over, under = (0.1 * weight * math.log(rope.factor) + 1 for weight in both)
        rope.attention_factor = over / under
