"""The global batches of streamed data: one after the other, each whole on every rank."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, final

import numpy as np
import xxhash

from ..batches import Batch, chosen_rows, split_rows
from .mixture import Mixture
from .remote import Patience
from .rows import Finding
from .stop import EndOfData


class Mark(NamedTuple):
    """Before a batch."""

    state: dict[str, Any]
    counts: dict[str, float]


@final
class StreamBatches:
    """Like GlobalBatches, but its batches can only be had in order, and what comes next is in `state`."""

    def __init__(self, mixture: Mixture, *, sequences: int, patience: Patience, pool: ThreadPoolExecutor | None = None) -> None:
        self.mixture = mixture
        self.sequences = sequences
        self.fingerprint = _fingerprint(mixture)
        self._patience, self._pool = patience, pool
        self._step, self._current = -1, np.empty((0, 0), np.int64)
        self._marks = {0: self._mark(0)}
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
        return self._marks[self._step + 1 if step is None else step].state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made."""
        self.mixture.restore(state)
        self._step = state["step"] - 1
        self._marks = {state["step"]: self._mark(state["step"])}

    def counts(self, step: int | None = None) -> dict[str, float]:
        """For the metrics: tokens trained on by source, rows read, bad rows; before `step`, and with None until now."""
        return self._mark(self._step + 1).counts if step is None else self._marks[step].counts

    def _mark(self, step: int) -> Mark:
        record: dict[str, float] = {}
        total = max(1, sum(self.mixture.rows))
        for source, rows in zip(self.mixture.sources, self.mixture.rows, strict=True):
            record[f"data/{source.label}/share"] = rows / total
            record |= {f"data/{source.label}/{name}": count for name, count in source.counts().items()}
        return Mark({"step": step, **self.mixture.state()}, record)

    def findings(self) -> list[Finding]:
        """Rows that were skipped and files that failed since this was last asked; those of a round that is read again, again."""
        return [found for source in self.mixture.sources for found in source.findings()]

    def bad_rows(self) -> list[str]:
        """The same in words."""
        return [str(found) for found in self.findings()]

    def close(self) -> None:
        """End the threads."""
        self._patience.closed.set()
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
        self._marks = {at: mark for at, mark in self._marks.items() if at >= step - 1} | {step + 1: self._mark(step + 1)}


def _fingerprint(mixture: Mixture) -> str:
    """Of one source its own; of more, all of theirs with their weights."""
    if len(mixture.sources) == 1:
        return mixture.sources[0].fingerprint
    parts = [[source.fingerprint for source in mixture.sources], mixture.weights]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
