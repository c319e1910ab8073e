"""The number of sequences in each global batch, as a function of the step alone: so a run resumes from its step."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple, final


class Phase(NamedTuple):
    """Steps in a row, counted from 0, whose batches are of one size."""

    step: int
    row: int
    """Sequences of all steps before."""
    sequences: int


def batch_sizes(sequences: "int | BatchSizes") -> "BatchSizes":
    """Returns the sizes of batches that all have as many sequences, or what it is given."""
    return BatchSizes(sequences) if isinstance(sequences, int) else sequences


@final
class BatchSizes:
    """`sequences` in each batch; or, with a schedule, another number once that many tokens are behind the run.

    Tokens are counted as sequences x their length, whether they have a target or not.
    """

    def __init__(self, sequences: int, schedule: Sequence[float] = (), length: int = 1) -> None:
        """`schedule`: pairs of tokens and sequences, flattened, the tokens rising."""
        self.phases = [Phase(0, 0, sequences)]
        for tokens, size in zip(schedule[::2], schedule[1::2], strict=True):
            step, row, before = self.phases[-1]
            steps = -(-max(0, math.ceil(tokens / length) - row) // before)
            self.phases.append(Phase(step + steps, row + steps * before, int(size)))

    def of(self, step: int) -> int:
        """Returns the sequences of a step, counted from 0."""
        return self._phase(step).sequences

    def before(self, step: int) -> int:
        """Returns the sequences of all steps before `step` together."""
        phase = self._phase(step)
        return phase.row + (step - phase.step) * phase.sequences

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]
