"""Turns the findings of all ranks into a verdict on a layout: the largest differences, and the first tensor that differs.

Needs no torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..parallel.pipeline.schedule import place_of
from .choose_layouts import DEGREES, Layout
from .config import TOLERANCE
from .finding import KINDS, Finding

# Hints at the cause of a difference: a factor that is a degree of the layout, copies that were not summed, and others.


class Mismatch(NamedTuple):
    """A layout that differs, the findings of its ranks, and the first tensor that differs."""

    layout: Layout
    by_rank: list[list[Finding]]
    places: list[dict[str, int]]
    key: tuple[int, str, str]


class Hint(NamedTuple):
    """A hint. `cause` is short, and the same for all layouts that differ for one reason."""

    cause: str
    text: str


def hints(mismatch: Mismatch) -> list[Hint]:
    """Returns the hints, the likeliest first; none for an unknown pattern."""
    found = list(_scaled_by_rank(mismatch)) or [*_factors(mismatch), *_auxiliary(mismatch), *_not_added_up(mismatch)]
    return found or list(_by_kind(mismatch))


def _scaled_by_rank(mismatch: Mismatch) -> Iterator[Hint]:
    """Yields a hint if all gradients of a rank share a factor that differs between ranks."""
    if mismatch.key[1] != "gradient":
        return
    of_ranks = [
        [f.ratio or (0.0 if _differs(f) else 1.0) for f in rank if f.kind == "gradient" and f.digest] for rank in mismatch.by_rank
    ]
    factors = [ratios[0] for ratios in of_ranks if ratios]
    if all(_close(ratio, ratios[0]) for ratios in of_ranks for ratio in ratios) and not _close(min(factors), max(factors)):
        shown = ", ".join(f"{factor:.3g}" for factor in factors)
        yield Hint(
            "clipping", f"each rank multiplies all its gradients by a factor of its own ({shown}): clipped by the rank's own norm?"
        )


def _factors(mismatch: Mismatch) -> Iterator[Hint]:
    ratios = [finding.ratio for finding in _of_key(mismatch) if _differs(finding)]
    if not ratios or any(ratio is None or not _close(ratio, ratios[0] or 0.0) for ratio in ratios):
        return
    yield from _named(ratios[0] or 0.0, mismatch.layout, "exactly {} of what one process has")


def _auxiliary(mismatch: Mismatch) -> Iterator[Hint]:
    factors = [finding.auxiliary for finding in _of_key(mismatch) if _differs(finding)]
    if not factors or any(factor is None or not _close(factor, factors[0] or 0.0) for factor in factors):
        return
    yield from _named(
        factors[0] or 0.0, mismatch.layout, "cross entropy's part is right, that of balance losses and z-loss is exactly {}"
    )


def _named(ratio: float, layout: Layout, text: str) -> Iterator[Hint]:
    """Yields a hint for each number of the layout that equals the ratio or its inverse."""
    found = False
    for name, number in numbers(layout).items():
        if _close(ratio * number, 1.0):
            found = True
            yield Hint(f"1 / {name}", f"{text.format(f'1/{number}')}, 1 / {name}: averaged where it must be summed?")
        if _close(ratio, float(number)):
            found = True
            yield Hint(name, f"{text.format(f'{number} times')}, {name}: counted more than once?")
    if not found:
        yield Hint(f"{ratio:.6g}", text.format(f"{ratio:.6g} times"))


def numbers(layout: Layout) -> dict[str, int]:
    """Returns the degrees and counts of a layout that are more than one, by name."""
    degrees = {f"parallel.{name}": getattr(layout.parallel, name, 1) for name in DEGREES}
    counted = {"data ranks": layout.data_ranks, "ranks": layout.ranks, "micro-batches": layout.accumulation}
    passes = {"forward passes with recomputation": 1 + layout.parallel.recompute.repeats}
    return {name: number for name, number in (degrees | counted | passes).items() if number > 1}


def _not_added_up(mismatch: Mismatch) -> Iterator[Hint]:
    """Dimensions of the grid along which copies disagree."""
    name, found = mismatch.key[2], {}
    held = [(rank, f) for rank, findings in enumerate(mismatch.by_rank) for f in findings if f[:3] == mismatch.key]
    for rank, finding in held:
        for other, copy in held:
            if other > rank and copy[4:6] == finding[4:6] and copy.digest != finding.digest:
                one, two = mismatch.places[rank], mismatch.places[other]
                dims = [dim for dim in one if dim.startswith("expert") == (".experts." in name) and one[dim] != two[dim]]
                if len(dims) == 1:
                    found.setdefault(dims[0], (rank, other))
    for dim, (rank, other) in found.items():
        what = "each its own part: not summed" if mismatch.key[1] == "gradient" else "which must be one value"
        yield Hint(f"not added up over {dim}", f"ranks {rank} and {other} hold copies that disagree, {what} over the {dim} ranks?")


def _by_kind(mismatch: Mismatch) -> Iterator[Hint]:
    kind = mismatch.key[1]
    if kind == "expert bias" and mismatch.layout.accumulation > 1:
        yield Hint(
            "bias per micro-batch", "it moves once a step, from the counts of the global batch: moved once per micro-batch here?"
        )
    elif kind == "output" and mismatch.layout.accumulation > 1 and _only_later_rows(mismatch):
        text = "the first micro-batch agrees and a later one does not: was an expert bias moved per micro-batch?"
        yield Hint("bias per micro-batch", text)
    elif kind == "output" and mismatch.layout.parallel.context > 1:
        yield from _by_chunk(mismatch)
    elif kind == "gradient" and (last := _place_of_head(mismatch)) not in (wrong := _wrong_stages(mismatch)) and wrong:
        text = f"the gradients of stage {last} of the pipeline agree, those of stage {max(wrong)} do not: does it leave its own"
        yield Hint("a stage's own losses", f"{text} balance losses and z-loss out, or receive a wrong gradient?")
    elif kind == "gradient norm":
        yield Hint("norm", "all gradients agree: are the squares added up over all ranks, and copies counted once?")
    elif kind == "weight":
        yield Hint("update", "losses, gradients and norms agree: look at clipping and the optimizer")


def _by_chunk(mismatch: Mismatch) -> Iterator[Hint]:
    """Yields a hint if some tokens of the sequences agree and others do not."""
    found = _of_key(mismatch)
    wrong = sorted({(f.offsets[1], f.offsets[1] + f.sizes[1]) for f in found if _differs(f)})
    right = {(f.offsets[1], f.offsets[1] + f.sizes[1]) for f in found} - set(wrong)
    if right:
        shown = ", ".join(f"{first} to {end - 1}" for first, end in wrong)
        text = f"tokens {shown} differ, the others agree: rotated by the positions of other chunks, or without the keys of one?"
        yield Hint("context chunks", text)


def _place_of_head(mismatch: Mismatch) -> int:
    parallel = mismatch.layout.parallel
    return place_of(parallel.pipeline_schedule, parallel.pipeline, parallel.pipeline_stages - 1)


def _wrong_stages(mismatch: Mismatch) -> set[int]:
    """Returns the stages of a pipeline with a gradient that differs. The embedding, of which two have a copy, does not count."""
    wrong = set()
    for place, findings in zip(mismatch.places, mismatch.by_rank, strict=True):
        if any(f.kind == "gradient" and f.name != "embedding.weight" and _differs(f) for f in findings):
            wrong.add(place["pipeline"])
    return wrong


def _only_later_rows(mismatch: Mismatch) -> bool:
    """Whether the shard of each rank's first micro-batch is right."""
    firsts = [next(finding for finding in findings if finding[:3] == mismatch.key) for findings in mismatch.by_rank]
    return not any(_differs(finding) for finding in firsts)


def _of_key(mismatch: Mismatch) -> list[Finding]:
    return [finding for findings in mismatch.by_rank for finding in findings if finding[:3] == mismatch.key]


def _differs(finding: Finding) -> bool:
    return not finding.difference <= TOLERANCE


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * max(abs(one), abs(other))


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
    """The result of comparing a layout with one process."""

    layout: str
    ranks: int
    seconds: float
    differences: dict[str, float]
    """The largest relative difference of each kind."""
    first: First | None = None
    hints: tuple[Hint, ...] = ()
    numbers: tuple[str, ...] = ()
    """The degrees and counts of the layout that are more than one."""
    error: str = ""
    """Why there is no comparison: the error of a rank, or which rank did not answer."""

    @property
    def equal(self) -> bool:
        return self.first is None and not self.error

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        first = self.first and {**self.first._asdict(), "layer": layer_of(self.first.name)}
        facts = {name: value for name, value in self._asdict().items() if name != "numbers"}
        return {"equal": self.equal, **facts, "first": first, "hints": [hint.text for hint in self.hints]}


def judge(layout: Layout, by_rank: list[list[Finding]], places: list[dict[str, int]], seconds: float = 0.0) -> Verdict:
    """Returns the verdict from the findings of each rank (`by_rank`) and the position of each rank in the grids (`places`)."""
    groups: dict[tuple[int, str, str], list[tuple[int, Finding]]] = defaultdict(list)
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            groups[finding.step, finding.kind, finding.name].append((rank, finding))
    if layout.parallel.pipeline > 1:
        groups = {key: groups[key] for key in sorted(groups, key=_in_order_of_computation)}
    differences = dict.fromkeys(KINDS, 0.0)
    for (_, kind, _), group in groups.items():
        differences[kind] = max(differences[kind], *(finding.difference for _, finding in group))
    first = next((found for key, group in groups.items() if (found := _fault(key, group)) is not None), None)
    if first is None:
        return Verdict(layout.text, layout.ranks, seconds, differences, numbers=tuple(numbers(layout)))
    mismatch = Mismatch(layout, by_rank, places, (first.step, first.kind, first.name))
    return Verdict(layout.text, layout.ranks, seconds, differences, first, tuple(hints(mismatch)))


def place(sizes: dict[str, int], rank: int) -> dict[str, int]:
    """Returns the position of a rank in each dimension of both grids (`sizes` of parallel/mesh.py); the last varies fastest."""
    found = {}
    for experts in (True, False):
        rest = rank
        for name in reversed([name for name in sizes if name.startswith("expert") == experts]):
            rest, found[name] = divmod(rest, sizes[name])
    return found


def layer_of(name: str) -> str:
    """Returns the layer of a parameter or module, in words; empty if it is in none."""
    head, _, rest = name.partition(".")
    words = {"layers": "layer", "mtp": "mtp module"}
    return f"{words[head]} {rest.partition('.')[0]}" if head in words else ""


def _in_order_of_computation(key: tuple[int, str, str]) -> tuple[int, int, int]:
    """For the findings of several stages, each of which is in order by itself: gradients of the last layers come first."""
    step, kind, name = key
    part, _, rest = name.partition(".")
    layer = int(rest.partition(".")[0]) if part in ("layers", "mtp") else 0
    place = {"embedding": 0, "layers": 1, "norm": 2, "head": 2, "mtp": 3}.get(part, 0) * 10**6 + layer
    return step, list(KINDS).index(kind), -place if kind == "gradient" else place


def _fault(key: tuple[int, str, str], group: list[tuple[int, Finding]]) -> First | None:
    wrong = [(finding.difference, -rank) for rank, finding in group if not finding.difference <= TOLERANCE]
    if wrong:
        difference, rank = max(wrong)
        return First(*key, -rank, sorted({-rank for _, rank in wrong}), difference, "differs")
    copies = disagreeing(group)
    if copies:
        return First(*key, copies[0], copies, 0.0, "copies disagree")
    shards = {(*finding.offsets, *finding.sizes): math.prod(finding.sizes) for _, finding in group}
    if sum(shards.values()) != math.prod(group[0][1].shape):  # shards are disjoint or copies
        return First(*key, 0, [rank for rank, _ in group], 0.0, "is incomplete")
    return None


def disagreeing(group: list[tuple[int, Finding]]) -> list[int]:
    """Returns the ranks whose copies of a shard differ bitwise, including the rank of the first copy."""
    copies: dict[tuple[int, ...], tuple[int, str]] = {}
    found: set[int] = set()
    for rank, finding in group:
        holder, digest = copies.setdefault((*finding.offsets, *finding.sizes), (rank, finding.digest))
        if digest != finding.digest:
            found |= {holder, rank}
    return sorted(found)
