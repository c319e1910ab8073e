"""Several sources as one sequence of rows. The next source follows from the weights alone, so shares of tokens are exact."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, final

import numpy as np
import xxhash

from ..batch_sizes import BatchSizes, batch_sizes
from ..batches import Batch, chosen_rows, split_rows
from ..errors import EndOfData
from ..permutation import COMPUTED, SORTED
from .documents import TokenizingRanks
from .http import RetryPolicy
from .packing import ReadFailure, RowSource


@final
class Mixture:
    """Takes each row from the source that is furthest behind its weight. The share of a source that ends goes to the others."""

    def __init__(self, sources: list[RowSource], weights: list[float], ranks: TokenizingRanks) -> None:
        assert len(sources) == len(weights) and all(weight > 0 for weight in weights)
        self.ranks = ranks
        self.sources = sources
        self.weights = weights
        self._weights = np.array(weights, dtype=np.float64)
        self.rows = [0] * len(sources)
        """Rows taken of each source."""
        self._since = [0] * len(sources)
        """Rows taken of each source since a source last ended."""
        self.ended = [False] * len(sources)

    def take(self, count: int) -> np.ndarray:
        """Returns source and place of the next `count` rows, (count, 2); fewer once all sources have ended. Collective."""
        parts: list[np.ndarray] = []
        while count > 0 and not all(self.ended):
            taken = self._take_some(count)
            parts.append(taken)
            count -= len(taken)
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def read(self, rows_B2: np.ndarray) -> np.ndarray:
        """Returns this rank's of a global batch of rows, (rows, S + 1) int64, in their order. Collective."""
        own = np.flatnonzero(self.ranks.takes(np.arange(len(rows_B2))))
        parts, places = [], []
        for index, source in enumerate(self.sources):
            at_B = np.flatnonzero(rows_B2[:, 0] == index)
            if len(at_B):
                parts.append(source.read(rows_B2[at_B, 1], at_B))
                places.append(np.searchsorted(own, at_B[self.ranks.takes(at_B)]))
        rows = np.concatenate(parts).astype(np.int64)
        return rows[np.argsort(np.concatenate(places))]

    def state(self) -> dict[str, Any]:
        """Returns the state of all sources as plain JSON."""
        return {
            "rows": list(self.rows),
            "since": list(self._since),
            "ended": list(self.ended),
            "sources": [{"label": each.label, "fingerprint": each.fingerprint, "state": each.state()} for each in self.sources],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`. Sources and weights may differ: known sources continue where they were, with the new shares."""
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
        """Returns for each source the index of the saved one with equal data: with its label if possible, else the first free."""
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
        """Whether the rows taken since a source last ended fit these weights: each source is ahead or behind by fewer rows than
        there are sources."""
        given, shares = np.array(self._since), self._shares()
        return bool((np.abs(given - shares * given.sum()) < len(given)).all())

    def _take_some(self, count: int) -> np.ndarray:
        """Like `take`, but stops where a source ends."""
        plan = self._plan(count)
        wanted = np.bincount(plan, minlength=len(self.sources))
        taken = [
            source.take(int(rows)) if rows else np.empty(0, np.int64) for source, rows in zip(self.sources, wanted, strict=True)
        ]
        short = [index for index, rows in enumerate(taken) if len(rows) < wanted[index]]
        at, rows = [0] * len(self.sources), []
        for index in plan:
            if at[index] < len(taken[index]):
                rows.append((index, taken[index][at[index]]))
                at[index] += 1
                self.rows[index] += 1
                self._since[index] += 1
        for index in short:
            self.ended[index] = True
        if short:
            self._since = [0] * len(self.sources)
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def _shares(self) -> np.ndarray:
        """Returns normalized weights of the sources that have not ended; zero for the others."""
        live = ~np.array(self.ended)
        return np.where(live, self._weights, 0) / (self._weights[live].sum() or 1.0)

    def _plan(self, count: int) -> np.ndarray:
        """Returns the source of each of the next `count` rows."""
        live, shares = ~np.array(self.ended), self._shares()
        given, plan = np.array(self._since), np.empty(count, np.int64)
        for row in range(count):
            behind = np.where(live, shares * (given.sum() + 1) - given, -np.inf)
            plan[row] = behind.argmax()
            given[plan[row]] += 1
        return plan


# Global batches of streamed data; a rank has its own rows of each.


class BatchSnapshot(NamedTuple):
    """State and metrics before a batch."""

    state: dict[str, Any]
    metrics: dict[str, float]


@final
class StreamBatches:
    """Like GlobalBatches, but its batches can only be read in order, from a state."""

    def __init__(
        self, mixture: Mixture, *, sequences: int | BatchSizes, retry: RetryPolicy, pool: ThreadPoolExecutor | None = None
    ) -> None:
        self.mixture = mixture
        self.sizes = batch_sizes(sequences)
        self.fingerprint = _fingerprint(mixture)
        self._retry, self._pool = retry, pool
        self._places = np.empty(0, np.int64)
        """Where each row of the global batch is in `_current`; outside of it for those of other ranks."""
        self._step, self._current, self._order = -1, np.empty((0, 0), np.int64), COMPUTED
        self._snapshots = {0: self._snapshot(0)}
        """By step: of the next batch and of the last two, since one batch may be prepared while another is trained on."""

    def batch(self, step: int, rows: slice | range | None = None) -> Batch:
        """Returns the given rows (None: all) of the global batch of `step`, which is the last one again or the next. Collective.

        They must be of those that this rank takes. Raises a DataStop, on all ranks, if there is none; `state` does not change then.
        """
        self._advance(step)
        return split_rows(self._current[self._places[list(chosen_rows(rows, self.sizes.of(step)))]])

    def digest(self, step: int) -> str:
        """Returns xxh3-64 of the global batch, of which this rank takes all rows: S + 1 int64 token ids of each."""
        self._advance(step)
        assert len(self._current) == self.sizes.of(step)
        return xxhash.xxh3_64_hexdigest(self._current.astype("<i8").tobytes())

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Returns what `restore` needs to continue with the batch of `step`: plain JSON, the same on every rank.

        step: of the last batch, the one before it or the next one; None is the next.
        """
        return self._snapshots[self._step + 1 if step is None else step].state

    def restore(self, state: dict[str, Any]) -> None:
        """Continues from `state`."""
        self.mixture.restore(state)
        self._order = state.get("order", SORTED)
        self._step = state["step"] - 1
        self._snapshots = {state["step"]: self._snapshot(state["step"])}

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """Returns by source the share of the rows, rows read, bad rows and more, up to the batch of `step`; None: up to now."""
        return self._snapshot(self._step + 1).metrics if step is None else self._snapshots[step].metrics

    def _snapshot(self, step: int) -> BatchSnapshot:
        record: dict[str, float] = {}
        total = max(1, sum(self.mixture.rows))
        for source, rows in zip(self.mixture.sources, self.mixture.rows, strict=True):
            record[f"data/{source.label}/share"] = rows / total
            record |= {f"data/{source.label}/{name}": count for name, count in source.counts().items()}
        return BatchSnapshot({"step": step, "order": self._order, **self.mixture.state()}, record)

    def read_failures(self) -> list[ReadFailure]:
        """Rows that were skipped and files that failed since the last call. A round that is read again returns its own again."""
        return [found for source in self.mixture.sources for found in source.read_failures()]

    def close(self) -> None:
        """Stops the threads."""
        self._retry.closed.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _advance(self, step: int) -> None:
        if step == self._step:
            return
        assert step == self._step + 1, f"batch {step} of a stream whose next one is {self._step + 1}"
        sequences = self.sizes.of(step)
        taken = self.mixture.take(sequences)
        if len(taken) < sequences:
            raise EndOfData(f"the data ends after step {step}; {len(taken)} of {sequences} rows are left over")
        takes = self.mixture.ranks.takes(np.arange(sequences))
        self._places = np.where(takes, np.cumsum(takes) - 1, sequences)
        self._step, self._current = step, self.mixture.read(taken)
        self._snapshots = {at: mark for at, mark in self._snapshots.items() if at >= step - 1} | {
            step + 1: self._snapshot(step + 1)
        }


def _fingerprint(mixture: Mixture) -> str:
    """Returns the fingerprint of a single source, or a hash of those of all sources with their weights."""
    if len(mixture.sources) == 1:
        return mixture.sources[0].fingerprint
    parts = [[source.fingerprint for source in mixture.sources], mixture.weights]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
