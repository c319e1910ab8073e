"""Aggregates telemetry.jsonl while it is read, so that the data of a page stays small for a run of any length.

L layers with experts, E experts. A frame is a stretch of consecutive records. If there are too many frames, neighbours are merged,
so frames are equal stretches of the run, and each record counts in exactly one.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from .journal_reader import Record, RunError

FRAME_CELLS = 700_000
"""Limit for layers x experts x frames on a page."""
MOST_FRAMES = 240
RECENT = 20
"""Records over which classes, sources and dead experts are summed."""
PER_LAYER = ("router_entropy_L", "top1_L", "stability_L", "saturation_L")
LATEST = ("bias_LE", "grad_norm_LE", "dead_LE", "coactivation", "similarity", "vocabulary")


class Sums(NamedTuple):
    """Sums over the records of a frame."""

    first: int
    last: int
    records: int
    counts_LE: np.ndarray
    dropped_L: np.ndarray
    layers: dict[str, np.ndarray]
    """Sums of PER_LAYER and of `load_L`, max over mean; the last element is the number of records that have the value."""

    def plus(self, later: "Sums") -> "Sums":
        """Returns the sums of both frames."""
        names = {**self.layers, **later.layers}
        nothing = np.zeros(len(self.counts_LE) + 1)
        layers = {name: self.layers.get(name, nothing) + later.layers.get(name, nothing) for name in names}
        counts, dropped = self.counts_LE + later.counts_LE, self.dropped_L + later.dropped_L
        return Sums(self.first, later.last, self.records + later.records, counts, dropped, layers)


class Telemetry:
    """The aggregate of the records so far."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        """The block index of each row."""
        self.experts = 0
        self.frames: list[Sums] = []
        self.recent: deque[Sums] = deque(maxlen=RECENT)
        self.kinds: deque[dict[str, dict[str, np.ndarray]]] = deque(maxlen=RECENT)
        """`sources` and `classes` of the recent records, from names to counts_LE."""
        self.latest: dict[str, Any] = {}
        self._each = 1
        """Records of a full frame."""

    def add(self, record: Record) -> None:
        """Adds a record. Raises RunError if its shapes do not match."""
        try:
            sums = self._sums(record.values)
            kinds = {kind: self._tables(record.values.get(kind)) for kind in ("sources", "classes")}
            latest = {name: self._latest(name, record.values[name]) for name in LATEST if record.values.get(name)}
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError) as error:
            raise RunError(f"{record.where}: {' '.join(str(error).split()) or type(error).__name__}") from error
        self.recent.append(sums)
        if any(kinds.values()):
            self.kinds.append(kinds)
        self.latest |= latest
        if self.frames and self.frames[-1].records < self._each:
            self.frames[-1] = self.frames[-1].plus(sums)
        else:
            self.frames.append(sums)
        self._merge()

    def window(self) -> Sums | None:
        """Returns the sums over the recent records."""
        if not self.recent:
            return None
        first, *others = self.recent
        for sums in others:
            first = first.plus(sums)
        return first

    def of_kind(self, kind: str) -> dict[str, np.ndarray]:
        """counts_LE of each name of `sources` or `classes`, over the recent records."""
        total: dict[str, np.ndarray] = {}
        for kinds in self.kinds:
            for name, counts_LE in kinds[kind].items():
                total[name] = total.get(name, 0) + counts_LE
        return total

    def _sums(self, values: dict[str, Any]) -> Sums:
        missing = [name for name in ("step", "layers", "counts_LE", "dropped_L") if name not in values]
        if missing:
            raise ValueError(f"has no {missing[0]}")
        counts_LE = np.array(values["counts_LE"], dtype=np.int64)
        if counts_LE.ndim != 2 or not counts_LE.size:
            raise ValueError("counts_LE must be a table of layers x experts")
        if not self.layers:
            self.layers, self.experts = [int(layer) for layer in values["layers"]], counts_LE.shape[1]
        if [int(layer) for layer in values["layers"]] != self.layers or counts_LE.shape != (len(self.layers), self.experts):
            raise ValueError(f"counts_LE must be {len(self.layers)} x {self.experts}, as before")
        layers = {name: self._row(values[name]) for name in PER_LAYER if values.get(name)}
        layers["load_L"] = np.append(max_over_mean(counts_LE), 1.0)
        step = int(values["step"])
        return Sums(step, step, 1, counts_LE, self._row(values["dropped_L"])[:-1], layers)

    def _row(self, values: Any) -> np.ndarray:
        """Returns the value of each layer, followed by 1, the number of records."""
        row = np.array(values, dtype=float)
        if row.shape != (len(self.layers),):
            raise ValueError(f"must have {len(self.layers)} numbers, one for each layer")
        return np.append(row, 1.0)

    def _latest(self, name: str, found: Any) -> Any:
        """Returns a table of layers x experts; or, by layer as text, one of experts x experts or the tokens of each expert."""
        if name.endswith("_LE"):
            return self._checked(name, np.array(found, dtype=float), (len(self.layers), self.experts))
        if name == "vocabulary":
            return {
                str(layer): [[(str(text), int(count)) for text, count in words] for words in each] for layer, each in found.items()
            }
        size = (self.experts, self.experts)
        return {str(layer): self._checked(name, np.array(table, dtype=float), size) for layer, table in found.items()}

    def _checked(self, name: str, table: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        if table.shape != shape:
            raise ValueError(f"{name} must be {shape[0]} x {shape[1]}")
        return table

    def _tables(self, tables: Any) -> dict[str, np.ndarray]:
        size, found = (len(self.layers), self.experts), (tables or {}).items()
        return {str(name): self._checked(f"{name}", np.array(table, dtype=np.int64), size) for name, table in found}

    def _merge(self) -> None:
        most = max(8, min(MOST_FRAMES, FRAME_CELLS // (len(self.layers) * self.experts)))
        if len(self.frames) > most:
            pairs = [self.frames[at : at + 2] for at in range(0, len(self.frames), 2)]
            self.frames = [pair[0].plus(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
            self._each *= 2


def max_over_mean(counts_LE: np.ndarray) -> np.ndarray:
    """Returns the load of the busiest expert of each layer over an even share; 0 if nothing was routed."""
    mean_L = counts_LE.mean(axis=-1)
    return np.divide(counts_LE.max(axis=-1), mean_L, out=np.zeros_like(mean_L), where=mean_L > 0)
