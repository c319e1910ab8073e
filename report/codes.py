"""Tables of numbers as text of one byte each, which is what a heat map can show: 256 colours."""

import base64
from typing import Any

import numpy as np

STEPS = 253
"""Codes 1 to 254 are values from lowest to highest; 0 is none at all (an expert without a token), 255 is not known."""
LOWEST_RATIO = 1 / 32


def ratios(values: np.ndarray, highest: float) -> dict[str, Any]:
    """Multiples of an even share, on a logarithmic scale from 1/32 to `highest`; 0 is kept apart."""
    low, high = np.log2(LOWEST_RATIO), np.log2(max(highest, 4.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        place = (np.log2(values) - low) / (high - low)
    return _coded(values, place, values == 0) | {"log": True, "low": float(low), "high": float(high)}


def amounts(values: np.ndarray, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Plain numbers on a linear scale between their extremes, or those given."""
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if low is None and finite.size else low or 0.0
    high = float(finite.max()) if high is None and finite.size else high or 0.0
    place = (values - low) / (high - low if high > low else 1.0)
    return _coded(values, place, np.zeros(values.shape, dtype=bool)) | {"log": False, "low": low, "high": high}


def _coded(values: np.ndarray, place: np.ndarray, none: np.ndarray) -> dict[str, Any]:
    known = np.isfinite(values)
    codes = 1 + np.rint(np.clip(np.where(known & ~none, place, 0.0), 0.0, 1.0) * STEPS)
    bytes_ = np.where(known, np.where(none, 0, codes), 255).astype(np.uint8).tobytes()
    return {"shape": list(values.shape), "codes": base64.b64encode(bytes_).decode()}
