"""Checks the facts of a checkpoint (plain JSON saved with its tensors) before anything uses them. No torch here."""

import math
import re
from collections.abc import Callable
from typing import Any

from ..moe.config import ModelConfig
from ..ranges import inside, ranges
from .bounded import brief

DEEPEST = 32
MOST_VALUES = 1 << 20
LARGEST_NUMBER = 1 << 128
RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


def _whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _sizes(value: Any) -> bool:
    return isinstance(value, dict) and all(type(size) is int and size >= 1 for size in value.values())


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "config": (lambda value: isinstance(value, dict), "an object"),
    "step": (_whole, "a whole number"),
    "tokens": (_whole, "a whole number"),
    "ranks": (_whole, "a whole number"),
    "layout": (lambda value: value is None or _sizes(value), "an object of sizes"),
    "tokenizer_hash": (_text, "a text or null"),
    "data_fingerprint": (_text, "a text or null"),
    "data_state": (lambda value: value is None or isinstance(value, dict), "an object or null"),
    "validation_loss": (lambda value: value is None or type(value) in (int, float), "a number or null"),
    "run_id": (lambda value: value is None or (isinstance(value, str) and bool(RUN_ID.fullmatch(value))), "a word or null"),
    "source": (lambda value: isinstance(value, dict) and isinstance(value.get("config", {}), dict), "an object"),
    "extra": (lambda value: isinstance(value, dict), "an object"),
    "torch": (_text, "a text or null"),
}
"""By name of a fact that is used: a check of its value, and what it must be. Any may be absent."""


def check_facts(facts: Any) -> dict[str, Any]:
    """Returns `facts`. Raises ValueError for a value of the wrong type, or a number or a size that no run has."""
    if not isinstance(facts, dict):
        raise ValueError("facts must be an object")
    check_plain(facts, "facts")
    for name, (right, kind) in KINDS.items():
        if name in facts and not right(facts[name]):
            raise ValueError(f"facts.{name} = {brief(facts[name])} must be {kind}")
    check_model_numbers(facts.get("config", {}))
    return facts


def needed_facts(facts: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Returns `facts`. Raises ValueError for the first of `names` that is not in them."""
    for name in names:
        if name not in facts:
            raise ValueError(f"it is not of a run: its facts lack {name!r}")
    return facts


def check_plain(value: Any, place: str) -> None:
    """Raises ValueError for nesting, a number or a count of values beyond what a configuration or a state has."""
    left, count = [(value, 0)], 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > DEEPEST or count > MOST_VALUES:
            raise ValueError(f"{place}: nested too deeply, or too many values")
        if isinstance(one, dict):
            left += [(part, depth + 1) for part in one.values()]
        elif isinstance(one, list):
            left += [(part, depth + 1) for part in one]
        elif (isinstance(one, float) and math.isinf(one)) or (isinstance(one, int) and abs(one) > LARGEST_NUMBER):
            raise ValueError(f"{place}: a number that is too large")


def check_model_numbers(config: dict[str, Any]) -> None:
    """Raises ValueError for a number under `model` of a plain configuration that is out of its range.

    Other keys are not checked.
    """
    for key, interval in ranges(ModelConfig, "model.").items():
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if type(value) in (int, float) and not inside(value, interval):
            raise ValueError(f"{key}={brief(value)}: must be in {interval}")
