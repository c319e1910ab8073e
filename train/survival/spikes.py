"""Loss and gradient norm of the last steps, and whether a new one is far above them."""

import math
from collections import deque
from statistics import fmean, pstdev
from typing import Any

LEAST = 8
"""Steps without which nothing is called a spike."""
FLOOR = 0.02
"""The least deviation, as a share of the mean: where nothing moves, little is no spike."""


LONG_TAIL = {"loss": 1.0, "gradient norm": 3.0}
"""So many times the mean, at least. The norm of healthy runs has a long tail, which clipping takes care of."""


class Window:
    """The last `size` values of both. They are the same on every rank, and so is all that follows from them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: dict[str, deque[float]] = {name: deque(maxlen=size) for name in ("loss", "gradient norm")}

    def spike(self, loss: float, norm: float, sigma: float) -> str | None:
        """In words, if one of them lies more than `sigma` standard deviations above the mean."""
        for (name, values), value in zip(self.values.items(), (loss, norm), strict=True):
            if len(values) >= max(LEAST, self.size // 4):
                mean = fmean(values)
                deviation = max(pstdev(values), FLOOR * abs(mean))
                if value > max(mean + sigma * deviation, LONG_TAIL[name] * mean):
                    return f"{name} {value:.4g} is {(value - mean) / deviation:.1f} sigma above {mean:.4g}"
        return None

    def add(self, loss: float, norm: float) -> None:
        for values, value in zip(self.values.values(), (loss, norm), strict=True):
            if math.isfinite(value):
                values.append(value)

    def state(self) -> dict[str, Any]:
        """Plain JSON, which keeps every bit of a float."""
        return {name: list(values) for name, values in self.values.items()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, values in self.values.items():
            values.clear()
            values.extend(state.get(name, []))
