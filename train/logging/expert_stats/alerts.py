"""What of the experts' load people want to be told at once. Each is told once, and again only after it was over.

Titles are of all alerts of a run; those that are not of the experts are raised where they are found.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

TITLES = {
    "not_finite": "Loss or gradient is not finite",
    "spike": "Spike",
    "stall": "The run hangs",
    "collapse": "Router collapse",
    "dead_experts": "Dead experts",
    "replicas": "Copies of a weight differ",
    "straggler": "A slow rank",
    "checkpoint_failed": "Checkpoint not written",
    "disk": "No room for the next checkpoint",
    "trackers": "A tracker did not start",
    "file_failed": "A file of the data failed",
}

GRAVE = ("not_finite", "stall", "replicas", "checkpoint_failed")
"""Kinds that are an error; the others are a warning."""

COLLAPSED = 0.2
"""A layer has collapsed if it uses fewer experts than top-k and this share of the others; see `experts_in_use`."""


class Alerts:
    """Hears records of telemetry.jsonl."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._collapsed: set[int] = set()
        self._dead: set[tuple[int, int]] = set()

    def heard(self, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Kind and text of what is new."""
        rows = zip(record["layers"], record["counts_LE"], strict=True)
        collapsed = {layer: used for layer, counts_E in rows if (used := experts_in_use(counts_E)) < self._floor(len(counts_E))}
        for layer in sorted(collapsed.keys() - self._collapsed):
            yield "collapse", f"layer {layer} uses only about {collapsed[layer]:.1f} of its {len(record['counts_LE'][0])} experts"
        self._collapsed = set(collapsed)
        rows = zip(record["layers"], record.get("dead_LE", []), strict=False)
        dead = {(layer, expert) for layer, dead_E in rows for expert, is_dead in enumerate(dead_E) if is_dead}
        if new := sorted(dead - self._dead):
            some = ", ".join(f"{expert} of layer {layer}" for layer, expert in new[:8]) + (", ..." if len(new) > 8 else "")
            yield "dead_experts", f"{len(new)} experts get no tokens any more: {some}"
        self._dead = dead

    def _floor(self, experts: int) -> float:
        return self._top_k + COLLAPSED * (experts - self._top_k)


def experts_in_use(counts_E: list[int]) -> float:
    """exp of the entropy of the load: E experts if it is even, as many as have all of it if few do. E where nothing was routed."""
    total = sum(counts_E)
    if not total:
        return float(len(counts_E))
    return math.exp(-sum(n / total * math.log(n / total) for n in counts_E if n))
