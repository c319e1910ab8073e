"""Who hangs: the ranks that the others wait for, from the positions of all ranks that answer."""

from collections import Counter
from typing import NamedTuple


class Position(NamedTuple):
    """Where the training thread of a rank is: the content of its note."""

    rank: int
    step: int
    phase: str
    layer: int | None
    collective: str | None
    """None: it does not wait for others."""
    number: int
    """Collectives begun."""
    seconds: float
    """How long it has been there."""
    start: str
    """Identifies the start of the run."""
    place: int = 0
    """Of its stages in the pipeline. Ranks of one place begin the same collectives and passes."""
    neighbour: int | None = None
    """The rank of another place whose message it waits for."""
    passes: int = 0
    """Passes through stages begun."""
    in_schedule: bool = False
    """Whether it runs the schedule of the pipeline."""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        within = f", {self.collective}" if self.collective else ", in no collective"
        return f"step {self.step}, {self.phase}{layer}{within}, for {self.seconds:.1f} s"


class HangDiagnosis(NamedTuple):
    ranks: list[int]
    """Those that the others wait for."""
    text: str
    step: int | None = None
    phase: str | None = None
    layer: int | None = None
    collective: str | None = None
    """Where the others wait."""
    silent: bool = False
    """Whether `ranks` gave no answer: they are frozen, or gone."""


def diagnose(positions: dict[int, Position], world: int) -> HangDiagnosis:
    """Names the ranks that the others wait for, by the first of these that any rank is: silent, busy, behind, elsewhere.

    Stages of a pipeline rightly have begun different numbers of collectives: these are compared between ranks of one place.
    """
    ranks, why = _culprits(positions, world)
    waiting = [position for position in positions.values() if position.rank not in ranks] or list(positions.values())
    others = max(waiting, key=lambda position: position.seconds)
    where = [f"rank {rank} ({positions.get(rank, 'no answer')})" for rank in ranks]
    text = f"hang: {', '.join(where)} {why}; the others wait: {others}"
    silent = ranks[0] not in positions
    return HangDiagnosis(ranks, text, others.step, others.phase, others.layer, others.collective, silent)


def _culprits(positions: dict[int, Position], world: int) -> tuple[list[int], str]:
    silent = [rank for rank in range(world) if rank not in positions]
    if silent:
        return silent, "is frozen, or its host is gone"
    busy = [rank for rank, position in positions.items() if position.collective is None]
    if busy:
        return busy, "has not reached this collective"
    peers = {rank: [other for other in positions.values() if other.place == at.place] for rank, at in positions.items()}
    behind = {rank for rank, at in positions.items() if any(at.number < other.number for other in peers[rank])}
    skipped = [rank for rank in behind if all(positions[rank].passes > other.passes for other in peers[rank] if other.rank != rank)]
    if skipped:
        return skipped, "skipped a collective"
    free = {rank: at for rank, at in positions.items() if not _blockers(at, peers[rank], positions)}
    if not free:
        return sorted(positions), "wait for each other's messages"
    if behind & set(free):
        return sorted(behind & set(free)), "is behind"
    return _elsewhere(free), "skipped a collective or entered a different one"


def _blockers(position: Position, peers: list[Position], positions: dict[int, Position]) -> list[int]:
    """Returns the ranks that this one waits for, given that all wait. `peers`: the ranks of its place.

    For a message that is its sender. In a collective it is the peers that have begun fewer; outside of the schedule, where stages
    meet, also all ranks that are still in it.
    """
    if position.neighbour is not None:
        return [position.neighbour]
    late = [other.rank for other in peers if other.number < position.number]
    return late or [other.rank for other in positions.values() if other.in_schedule and not position.in_schedule]


def _elsewhere(positions: dict[int, Position]) -> list[int]:
    """Returns the ranks at another place than most, given that all have begun equally many; of equal halves, the further one."""
    places = {rank: (at.step, at.phase, at.layer, at.collective) for rank, at in positions.items()}
    counts = Counter(places.values())
    if len(counts) == 1:
        return sorted(positions)
    furthest = {place: max(positions[rank].step for rank in positions if places[rank] == place) for place in counts}
    rarest = min(counts, key=lambda place: (counts[place], -furthest[place]))
    return [rank for rank in positions if places[rank] == rarest]
