"""Several sources as one sequence of rows: which one comes next depends on the weights alone, so shares of tokens are exact."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, final

import numpy as np
import xxhash

from ..batches import Batch, chosen_rows, split_rows
from ..errors import EndOfData
from .http import RetryPolicy
from .packing import ReadFailure, RowSource


@final
class Mixture:
    """Each row is of the source that is furthest behind its weight. A source that ends leaves its share to the others."""

    def __init__(self, sources: list[RowSource], weights: list[float]) -> None:
        assert len(sources) == len(weights) and all(weight > 0 for weight in weights)
        self.sources = sources
        self.weights = weights
        self._weights = np.array(weights, dtype=np.float64)
        self.rows = [0] * len(sources)
        """Rows that each has given."""
        self._since = [0] * len(sources)
        """Of those, rows given since a source last ended."""
        self.ended = [False] * len(sources)

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, (count, S + 1); fewer when all sources have ended."""
        parts: list[np.ndarray] = []
        while count > 0 and not all(self.ended):
            taken = self._some(count)
            parts.append(taken)
            count -= len(taken)
        return np.concatenate(parts) if parts else np.empty((0, 0), np.int64)

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        own = {"rows": self.rows, "since": self._since, "ended": self.ended}
        return {**{name: list(values) for name, values in own.items()}, "sources": [_labelled(each) for each in self.sources]}

    def restore(self, state: dict[str, Any]) -> None:
        """Also of a mixture with other sources or weights: those that were in it go on where they were, with the new shares."""
        same = self._match_saved(state["sources"])
        for source, index in zip(self.sources, same, strict=True):
            if index is not None:
                source.restore(state["sources"][index]["state"])
        self.rows[:] = [0 if index is None else state["rows"][index] for index in same]
        self.ended[:] = [False if index is None else state["ended"][index] for index in same]
        self._since[:] = [0 if index is None else state["since"][index] for index in same]
        if same != list(range(len(state["sources"]))) or not self._fits():
            self._since[:] = [0] * len(same)

    def _match_saved(self, saved: list[dict[str, Any]]) -> list[int | None]:
        """Which of the saved sources each source is: of equal data, that of its label, else the first that no other one is."""
        left = dict(enumerate(saved))
        found: list[int | None] = [None] * len(self.sources)
        for keys in (("fingerprint", "label"), ("fingerprint",)):
            for place, source in enumerate(self.sources):
                same = (i for i, each in left.items() if all(each.get(key) == getattr(source, key) for key in keys))
                if found[place] is None and (index := next(same, None)) is not None:
                    found[place] = index
                    del left[index]
        return found

    def _fits(self) -> bool:
        """Whether the rows given since a source last ended are those of these weights: no source is ever as many rows behind or
        ahead as there are sources."""
        given, shares = np.array(self._since), self._shares()
        return bool((np.abs(given - shares * given.sum()) < len(given)).all())

    def _some(self, count: int) -> np.ndarray:
        """Up to `count` rows, to the point where a source ends."""
        plan = self._plan(count)
        wanted = np.bincount(plan, minlength=len(self.sources))
        taken = [
            source.take(int(rows)) if rows else np.empty((0, 0), np.int64)
            for source, rows in zip(self.sources, wanted, strict=True)
        ]
        short = [index for index, rows in enumerate(taken) if len(rows) < wanted[index]]
        at, rows = [0] * len(self.sources), []
        for index in plan:
            if at[index] < len(taken[index]):
                rows.append(taken[index][at[index]])
                at[index] += 1
                self.rows[index] += 1
                self._since[index] += 1
        for index in short:
            self.ended[index] = True
        if short:
            self._since = [0] * len(self.sources)
        return np.stack(rows) if rows else np.empty((0, taken[0].shape[-1]), np.int64)

    def _shares(self) -> np.ndarray:
        """Of the sources that have not ended; zeros if all have."""
        live = ~np.array(self.ended)
        return np.where(live, self._weights, 0) / (self._weights[live].sum() or 1.0)

    def _plan(self, count: int) -> np.ndarray:
        """Which source each of the next rows is of."""
        live, shares = ~np.array(self.ended), self._shares()
        given, plan = np.array(self._since), np.empty(count, np.int64)
        for row in range(count):
            behind = np.where(live, shares * (given.sum() + 1) - given, -np.inf)
            plan[row] = behind.argmax()
            given[plan[row]] += 1
        return plan


def _labelled(source: RowSource) -> dict[str, Any]:
    return {"label": source.label, "fingerprint": source.fingerprint, "state": source.state()}


# The global batches of streamed data: one after the other, each whole on every rank.


class BatchSnapshot(NamedTuple):
    """Before a batch."""

    state: dict[str, Any]
    metrics: dict[str, float]


@final
class StreamBatches:
    """Like GlobalBatches, but its batches can only be had in order, and what comes next is in `state`."""

    def __init__(self, mixture: Mixture, *, sequences: int, retry: RetryPolicy, pool: ThreadPoolExecutor | None = None) -> None:
        self.mixture = mixture
        self.sequences = sequences
        self.fingerprint = _fingerprint(mixture)
        self._retry, self._pool = retry, pool
        self._step, self._current = -1, np.empty((0, 0), np.int64)
        self._snapshots = {0: self._snapshot(0)}
        """Of the batch that comes next, and of the last two: one may be made while another is trained on."""

    def batch(self, step: int, rows: slice | range | None = None) -> Batch:
        """The given rows (None: all) of the global batch of `step`, which is that of the last call or the next. Collective.

        Raises a DataStop, on all ranks, if there is none; `state` is then still that before it.
        """
        self._advance(step)
        return split_rows(self._current[list(chosen_rows(rows, self.sequences))])

    def digest(self, step: int) -> str:
        """xxh3-64 of the global batch: its int64 token ids, targets included, row by row."""
        self._advance(step)
        return xxhash.xxh3_64_hexdigest(self._current.astype("<i8").tobytes())

    def state(self, step: int | None = None) -> dict[str, Any]:
        """What `restore` needs to give the batch of `step`: plain JSON, the same on every rank.

        `step` is that of the last batch, of the one before it or of the one after it, which None is.
        """
        return self._snapshots[self._step + 1 if step is None else step].state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made."""
        self.mixture.restore(state)
        self._step = state["step"] - 1
        self._snapshots = {state["step"]: self._snapshot(state["step"])}

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """For the metrics: tokens trained on by source, rows read, bad rows; before `step`, and with None until now."""
        return self._snapshot(self._step + 1).metrics if step is None else self._snapshots[step].metrics

    def _snapshot(self, step: int) -> BatchSnapshot:
        record: dict[str, float] = {}
        total = max(1, sum(self.mixture.rows))
        for source, rows in zip(self.mixture.sources, self.mixture.rows, strict=True):
            record[f"data/{source.label}/share"] = rows / total
            record |= {f"data/{source.label}/{name}": count for name, count in source.counts().items()}
        return BatchSnapshot({"step": step, **self.mixture.state()}, record)

    def read_failures(self) -> list[ReadFailure]:
        """Rows that were skipped and files that failed since this was last asked; those of a round that is read again, again."""
        return [found for source in self.mixture.sources for found in source.read_failures()]

    def bad_rows(self) -> list[str]:
        """The same in words."""
        return [str(found) for found in self.read_failures()]

    def close(self) -> None:
        """End the threads."""
        self._retry.closed.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _advance(self, step: int) -> None:
        if step == self._step:
            return
        assert step == self._step + 1, f"batch {step} of a stream whose next one is {self._step + 1}"
        current = self.mixture.take(self.sequences)
        if len(current) < self.sequences:
            raise EndOfData(f"the data ends after step {step}; {len(current)} of {self.sequences} rows are left over")
        self._step, self._current = step, current
        self._snapshots = {at: mark for at, mark in self._snapshots.items() if at >= step - 1} | {
            step + 1: self._snapshot(step + 1)
        }


def _fingerprint(mixture: Mixture) -> str:
    """Of one source its own; of more, all of theirs with their weights."""
    if len(mixture.sources) == 1:
        return mixture.sources[0].fingerprint
    parts = [[source.fingerprint for source in mixture.sources], mixture.weights]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
