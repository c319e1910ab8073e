"""Alerts about the load of the experts: each is raised once, and again only after it was over.

TITLES has all alerts of a run; those that are not about experts are raised where they are found.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

TITLES = {
    "not_finite": "Loss or gradient is not finite",
    "spike": "Spike",
    "stall": "The run hangs",
    "collapse": "Router collapse",
    "dead_experts": "Dead experts",
    "replicas": "Copies of a weight differ",
    "straggler": "A slow rank",
    "checkpoint_failed": "Checkpoint not written",
    "local_failed": "Save to the hosts not written",
    "disk": "No room for the next checkpoint",
    "trackers": "A tracker did not start",
    "file_failed": "A file of the data failed",
}

ERRORS = ("not_finite", "stall", "replicas", "checkpoint_failed")
"""Kinds that are errors; the others are warnings."""

COLLAPSED = 0.2
"""A layer has collapsed if it uses fewer experts than top-k plus this share of the others; see `experts_in_use`."""


class Alerts:
    """Checks the records of telemetry.jsonl."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._collapsed: set[int] = set()
        self._dead: set[tuple[int, int]] = set()

    def check(self, record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """Yields kind and text of each alert that is new."""
        layers, counts_LE = record["layers"], np.asarray(record["counts_LE"], dtype=np.float64)
        experts = counts_LE.shape[1]
        least = self._top_k + COLLAPSED * (experts - self._top_k)
        in_use = dict(zip(layers, experts_in_use(counts_LE).tolist(), strict=True))
        collapsed = {layer for layer, used in in_use.items() if used < least}
        for layer in sorted(collapsed - self._collapsed):
            yield "collapse", f"layer {layer} uses only about {in_use[layer]:.1f} of its {experts} experts"
        self._collapsed = collapsed
        places = np.argwhere(np.asarray(record["dead_LE"])).tolist() if "dead_LE" in record else []
        dead = {(layers[row], expert) for row, expert in places}
        if new := sorted(dead - self._dead):
            some = ", ".join(f"{expert} of layer {layer}" for layer, expert in new[:8]) + (", ..." if len(new) > 8 else "")
            yield "dead_experts", f"{len(new)} experts get no tokens any more: {some}"
        self._dead = dead


def experts_in_use(counts_LE: np.ndarray) -> np.ndarray:
    """Returns for each layer exp of the entropy of the load: E for an even load, n if n experts share all of it, E for no load."""
    total_L1, experts = counts_LE.sum(1, keepdims=True), counts_LE.shape[1]
    share_LE = np.divide(counts_LE, total_L1, out=np.full_like(counts_LE, 1 / experts), where=total_L1 > 0)
    return np.exp(-(share_LE * np.log(np.where(share_LE > 0, share_LE, 1))).sum(1))
