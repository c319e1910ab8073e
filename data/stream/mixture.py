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
        """Also of a mixture with other sources or weights: those that were in it go on where they were, with the new shares."""
        same = self._places(state["sources"])
        for source, index in zip(self.sources, same, strict=True):
            if index is not None:
                source.restore(state["sources"][index]["state"])
        self.rows[:] = [0 if index is None else state["rows"][index] for index in same]
        self.ended[:] = [False if index is None else state["ended"][index] for index in same]
        self._since[:] = [0 if index is None else state["since"][index] for index in same]
        if same != list(range(len(state["sources"]))) or not self._fits():
            self._since[:] = [0] * len(same)

    def _places(self, saved: list[dict[str, Any]]) -> list[int | None]:
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
