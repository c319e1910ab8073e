"""Between config.json and ModelConfig."""

from contextlib import suppress
from typing import Any

from ..checkpoint.bounded import brief
from ..checkpoint.facts import check_model_numbers
from ..moe.config import ModelConfig
from .essence import differences
from .families import FAMILIES, Family
from .families.base import IRRELEVANT
from .keys import Keys
from .plain import plain_model


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
        raise ValueError(f"{place}quantization_config.quant_method={method!r}: weights must be bf16, fp16, fp32 or fp64")
    keys = Keys(config, family.defaults, place)
    model = family.read(keys)
    check_model_numbers({"model": plain_model(model)})
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
