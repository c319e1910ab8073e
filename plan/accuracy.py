"""How far the step-time model is from published measurements, on rows that the fit has seen and on rows that it has not."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .coefficients import Coefficients, coefficients
from .measurements import Measured
from .step_time import StepTime, seconds


@dataclass(frozen=True)
class Compared:
    """A row and its prediction."""

    row: Measured
    predicted: StepTime

    @property
    def error(self) -> float:
        """Predicted over measured seconds, less 1."""
        return self.predicted.likely / self.row.seconds - 1

    @property
    def covered(self) -> bool:
        """Whether the range holds the measurement."""
        return self.predicted.low <= self.row.seconds <= self.predicted.high

    @property
    def predicted_a_token(self) -> float:
        """Microseconds of one GPU."""
        return 1e6 / self.predicted.tokens_per_second_per_gpu


@dataclass(frozen=True)
class Figures:
    """Of several rows. Errors are absolute, as shares of what was measured."""

    rows: int
    configurations: int
    median: float
    ninth: float
    """Nine of ten rows are closer."""
    covered: float
    """Share of the rows that the range holds."""
    pairs: int
    ordered: float
    """Share of the pairs whose faster layout is predicted to be the faster one."""


def compare(rows: Iterable[Measured], using: Coefficients | None = None) -> list[Compared]:
    """Returns the rows with their predictions, by the committed coefficients if no others are given."""
    chosen = using or coefficients()
    return [Compared(row, seconds(row.counts, row.cluster, row.software, chosen)) for row in rows]


def figures(compared: Sequence[Compared]) -> Figures:
    """Returns the figures of at least two rows."""
    errors = sorted(abs(one.error) for one in compared)
    found = [right_order(*pair) for pair in itertools.combinations(compared, 2) if comparable(*pair)]
    return Figures(
        len(compared),
        len({one.row.configuration for one in compared}),
        statistics.median(errors),
        statistics.quantiles(errors, n=10, method="inclusive")[-1],
        statistics.fmean(one.covered for one in compared),
        len(found),
        statistics.fmean(found) if found else math.nan,
    )


def comparable(one: Compared, other: Compared) -> bool:
    """Whether they ask which of two layouts is faster: one model on one type of GPU, two layouts, and measured times of a GPU for a
    token that differ. Precision, software and date may differ too.
    """
    rows = one.row, other.row
    same = rows[0].family == rows[1].family and rows[0].cluster.gpu == rows[1].cluster.gpu
    return (
        same and rows[0].configuration != rows[1].configuration and one.row.microseconds_a_token != other.row.microseconds_a_token
    )


def right_order(one: Compared, other: Compared) -> bool:
    measured = one.row.microseconds_a_token - other.row.microseconds_a_token
    return measured * (one.predicted_a_token - other.predicted_a_token) > 0
