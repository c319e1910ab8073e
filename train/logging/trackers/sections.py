"""The sections of charts in trackers: which one each key of metrics.jsonl belongs to. The numbers are the same."""

from collections.abc import Mapping
from typing import Any

SECTIONS = {
    "optimizer": ("lr", "grad_norm"),
    "perf": ("tokens_per_second", "step_seconds", "mfu", "data_wait_fraction"),
    "data": ("padding_fraction",),
}
"""First words of keys without a section of their own; all others are of `train`."""
INDICES = ("_layer", "_rank")
"""Ends of keys whose value is the index of a layer or a rank, which no curve should show."""


def sectioned(key: str) -> str:
    """Returns the key with its section in front: lr becomes optimizer/lr, and moe/dead_experts stays."""
    if "/" in key:
        return key
    return f"{next((name for name, keys in SECTIONS.items() if key.startswith(keys)), 'train')}/{key}"


def is_index(key: str) -> bool:
    """Whether the value is the index of a layer or a rank."""
    return key.endswith(INDICES)


def charted(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a record's numbers for curves, without its step, by section."""
    return {sectioned(key): value for key, value in record.items() if key != "step" and not is_index(key)}
