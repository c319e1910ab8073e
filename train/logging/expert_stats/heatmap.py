"""Pictures of a record of telemetry.jsonl: experts in columns, layers in rows.

L layers that route, E experts.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from PIL import Image

STOPS = ((0.0, (14, 12, 52)), (0.5, (38, 84, 142)), (1.0, (34, 160, 132)), (1.5, (160, 216, 56)), (2.0, (253, 231, 37)))
"""Colours of a load over an even share: dark is idle, green is even, yellow is twice or more. They also differ in brightness."""

CELL = 12
"""Pixels of a cell's side; less where that would make the picture wider than WIDEST."""
WIDEST = 1536


def load_map(counts_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the picture of each expert's tokens over an even share of its layer, from 0 to 2: uint8 (height, width, 3)."""
    ratio_LE = load_ratio(counts_LE)
    at, colours = (np.array(part, dtype=np.float64) for part in zip(*STOPS, strict=True))
    rgb_LE3 = np.stack([np.interp(ratio_LE, at, colours[:, channel]) for channel in range(3)], axis=-1)
    cell = max(1, min(CELL, WIDEST // ratio_LE.shape[1]))
    return rgb_LE3.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)


def load_ratio(counts_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the tokens of each expert over the mean of its layer, (L, E); 0 where nothing was routed."""
    counts = np.asarray(counts_LE, dtype=np.float64)
    return counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)


def png(rgb: np.ndarray) -> bytes:
    """Returns a uint8 (height, width, 3) picture as a PNG file."""
    file = BytesIO()
    Image.fromarray(rgb).save(file, "PNG")
    return file.getvalue()
