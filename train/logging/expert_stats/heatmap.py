"""Pictures of a record of telemetry.jsonl: experts in columns, layers in rows. Made of arrays: nothing is drawn.

L layers that route, E experts.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np

STOPS = ((0.0, (14, 12, 52)), (0.5, (38, 84, 142)), (1.0, (34, 160, 132)), (1.5, (160, 216, 56)), (2.0, (253, 231, 37)))
"""Colours of a load over an even share: dark is idle, green is even, yellow is twice or more. Told apart without colour, too."""

CELL = 12
"""Pixels of a cell's side; less where that would make the picture wider than WIDEST."""
WIDEST = 1536


def load_map(counts_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """uint8 (height, width, 3): each expert's tokens over an even share of its layer, from 0 to 2."""
    ratio_LE = load_ratio(counts_LE)
    at, colours = (np.array(part, dtype=np.float64) for part in zip(*STOPS, strict=True))
    rgb_LE3 = np.stack([np.interp(ratio_LE, at, colours[:, channel]) for channel in range(3)], axis=-1)
    cell = max(1, min(CELL, WIDEST // ratio_LE.shape[1]))
    return rgb_LE3.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)


def load_ratio(counts_LE: Sequence[Sequence[int]]) -> np.ndarray:
    """(L, E): tokens of each expert over the mean of its layer; 0 where nothing was routed."""
    counts = np.asarray(counts_LE, dtype=np.float64)
    return counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-9)


def png(rgb: np.ndarray) -> bytes:
    """The file of a uint8 (height, width, 3) picture (PNG specification, sections 5 and 11)."""
    height, width, _ = rgb.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), rgb.reshape(height, width * 3)], axis=1)  # filter type 0
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (_chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(rows.tobytes())), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
