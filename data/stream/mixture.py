"""Several sources as one sequence of rows: which one comes next depends on the weights alone, so shares of tokens are exact."""

from typing import Any, final

import numpy as np

from .rows import RowSource


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
        """Also of a mixture with other sources or weights: those that were in it (by fingerprint) go on where they were."""
        known = {saved["fingerprint"]: (index, saved["state"]) for index, saved in enumerate(state["sources"])}
        same = [known.get(source.fingerprint, (None, None)) for source in self.sources]
        for source, (_, saved) in zip(self.sources, same, strict=True):
            if saved is not None:
                source.restore(saved)
        unchanged = [index for index, _ in same] == list(range(len(state["sources"])))
        lists: list[tuple[str, list[Any]]] = [("rows", self.rows), ("_since", self._since), ("ended", self.ended)]
        for name, values in lists:
            saved = state[name.lstrip("_")]
            values[:] = [type(values[0])(0) if index is None else saved[index] for index, _ in same]
            if name == "_since" and not unchanged:
                values[:] = [0] * len(values)

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

    def _plan(self, count: int) -> np.ndarray:
        """Which source each of the next rows is of."""
        live = ~np.array(self.ended)
        shares = np.where(live, self._weights, 0) / self._weights[live].sum()
        given, plan = np.array(self._since), np.empty(count, np.int64)
        for row in range(count):
            behind = np.where(live, shares * (given.sum() + 1) - given, -np.inf)
            plan[row] = behind.argmax()
            given[plan[row]] += 1
        return plan


def _labelled(source: RowSource) -> dict[str, Any]:
    return {"label": source.label, "fingerprint": source.fingerprint, "state": source.state()}
