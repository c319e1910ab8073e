"""From the findings of all ranks to a verdict about a layout: how large the differences are, and the first tensor that differs.

Nothing here needs torch.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

from .config import TOLERANCE
from .finding import KINDS, Finding
from .hints import Doubt, Hint, hints, numbers
from .layouts import Layout


class First(NamedTuple):
    """The first tensor that differs, in the order of computation, on the rank where it differs most."""

    step: int
    kind: str
    name: str
    rank: int
    ranks: list[int]
    """All ranks on which it differs."""
    difference: float
    fault: str
    """differs, copies disagree, or is incomplete."""


class Verdict(NamedTuple):
    """A layout against one process."""

    layout: str
    ranks: int
    seconds: float
    differences: dict[str, float]
    """The largest relative difference of each kind."""
    first: First | None = None
    hints: tuple[Hint, ...] = ()
    numbers: tuple[str, ...] = ()
    """What the layout has more than one of."""
    error: str = ""
    """Why there is no comparison: what a rank raised, or which did not answer."""

    @property
    def equal(self) -> bool:
        return self.first is None and not self.error

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        first = self.first and {**self.first._asdict(), "layer": layer_of(self.first.name)}
        facts = {name: value for name, value in self._asdict().items() if name != "numbers"}
        return {"equal": self.equal, **facts, "first": first, "hints": [hint.text for hint in self.hints]}


def judge(layout: Layout, by_rank: list[list[Finding]], places: list[dict[str, int]], seconds: float = 0.0) -> Verdict:
    """`by_rank`: the findings of each rank, in order; `places`: where each rank stands in the grids."""
    groups: dict[tuple[int, str, str], list[tuple[int, Finding]]] = defaultdict(list)
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            groups[finding.step, finding.kind, finding.name].append((rank, finding))
    differences = dict.fromkeys(KINDS, 0.0)
    for (_, kind, _), group in groups.items():
        differences[kind] = max(differences[kind], *(finding.difference for _, finding in group))
    first = next((found for key, group in groups.items() if (found := _fault(key, group)) is not None), None)
    if first is None:
        return Verdict(layout.text, layout.ranks, seconds, differences, numbers=tuple(numbers(layout)))
    doubt = Doubt(layout, by_rank, places, (first.step, first.kind, first.name))
    return Verdict(layout.text, layout.ranks, seconds, differences, first, tuple(hints(doubt)))


def place(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Where a rank stands in each dimension of both grids (`sizes` of parallel/mesh.py); the last of a grid is its neighbours."""
    found = {}
    for experts in (True, False):
        rest = rank
        for name in reversed([name for name in sizes if name.startswith("expert") == experts]):
            rest, found[name] = divmod(rest, sizes[name])
    return found


def layer_of(name: str) -> str:
    """In words, of a parameter's or module's name; empty if it is in none."""
    head, _, rest = name.partition(".")
    words = {"layers": "layer", "mtp": "mtp module"}
    return f"{words[head]} {rest.partition('.')[0]}" if head in words else ""


def _fault(key: tuple[int, str, str], group: list[tuple[int, Finding]]) -> First | None:
    wrong = [(finding.difference, -rank) for rank, finding in group if not finding.difference <= TOLERANCE]
    if wrong:
        difference, rank = max(wrong)
        return First(*key, -rank, sorted({-rank for _, rank in wrong}), difference, "differs")
    copies = disagreeing(group)
    if copies:
        return First(*key, copies[0], copies, 0.0, "copies disagree")
    if not _complete(group):
        return First(*key, 0, [rank for rank, _ in group], 0.0, "is incomplete")
    return None


def disagreeing(group: list[tuple[int, Finding]]) -> list[int]:
    """The ranks whose copies of one piece have other bits than the first copy, with the rank of that."""
    copies: dict[tuple[int, ...], tuple[int, str]] = {}
    found: set[int] = set()
    for rank, finding in group:
        holder, digest = copies.setdefault((*finding.offsets, *finding.sizes), (rank, finding.digest))
        if digest != finding.digest:
            found |= {holder, rank}
    return sorted(found)


def _complete(group: list[tuple[int, Finding]]) -> bool:
    """Whether the pieces, which are disjoint or copies, cover the whole tensor."""
    pieces = {(*finding.offsets, *finding.sizes): math.prod(finding.sizes) for _, finding in group}
    return sum(pieces.values()) == math.prod(group[0][1].shape)
