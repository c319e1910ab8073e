"""Which rank the others wait for, from where each of them says it is."""

from collections import Counter
from typing import NamedTuple


class Beat(NamedTuple):
    """Where the thread that trains was on one rank."""

    rank: int
    step: int
    phase: str
    layer: int | None
    collective: str | None
    """None: it did not wait for others."""
    number: int
    """Collectives begun."""
    seconds: float
    """For which it had been there."""
    start: str
    """Which start of the run it is of."""

    def place(self) -> str:
        """In words."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        within = f", {self.collective}" if self.collective else ", in no collective"
        return f"step {self.step}, {self.phase}{layer}{within}, for {self.seconds:.1f} s"


class Verdict(NamedTuple):
    ranks: list[int]
    """Those that the others wait for."""
    text: str
    step: int | None = None
    phase: str | None = None
    layer: int | None = None
    collective: str | None = None
    """Where the others wait."""


def blame(beats: dict[int, Beat], world: int) -> Verdict:
    """In this order: ranks that do not answer, that wait for nobody, that are behind, that wait for something else than most."""
    ranks, why = _late(beats, world)
    waiting = [beat for beat in beats.values() if beat.rank not in ranks] or list(beats.values())
    others = max(waiting, key=lambda beat: beat.seconds)
    where = [f"rank {rank} ({beats[rank].place() if rank in beats else 'no answer'})" for rank in ranks]
    text = f"hang: {', '.join(where)} {why}; the others wait: {others.place()}"
    return Verdict(ranks, text, others.step, others.phase, others.layer, others.collective)


def _late(beats: dict[int, Beat], world: int) -> tuple[list[int], str]:
    silent = [rank for rank in range(world) if rank not in beats]
    if silent:
        return silent, "is frozen, or its host is gone"
    busy = [rank for rank, beat in beats.items() if beat.collective is None]
    if busy:
        return busy, "does not come to it"
    fewest = min(beat.number for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.number == fewest]
    if len(behind) < len(beats):
        return behind, "is behind"
    return _elsewhere(beats), "has left one out, or does another"


def _elsewhere(beats: dict[int, Beat]) -> list[int]:
    """All have begun equally many: those at another place than most; with as many here as there, those that are further."""
    places = {rank: (beat.step, beat.phase, beat.layer, beat.collective) for rank, beat in beats.items()}
    counts = Counter(places.values())
    if len(counts) == 1:
        return sorted(beats)
    furthest = {place: max(beats[rank].step for rank in beats if places[rank] == place) for place in counts}
    rarest = min(counts, key=lambda place: (counts[place], -furthest[place]))
    return [rank for rank in beats if places[rank] == rarest]
