"""Fits the coefficients of plan/step_time.py on half of the published measurements: python -m tokenyard.plan.fit

The other half is looked at only to say how far it is off (plan/accuracy.py). Deterministic; a minute on one core.
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .coefficients import Coefficients, write_coefficients
from .measurements import Measured, measured
from .step_time import Tuning, seconds


class Prior(NamedTuple):
    """What is known of a coefficient before the fit: a few rows cannot tell trade-offs apart, and a prior keeps them physical."""

    likely: float
    spread: float
    """Standard deviation, of the logit of a share and of the logarithm of anything else."""
    share: bool
    """Between 0 and 1."""


PRIORS = {
    "hopper_bf16": Prior(0.75, 0.3, True),
    "hopper_fp8": Prior(0.60, 0.4, True),
    "blackwell_bf16": Prior(0.75, 0.3, True),
    "blackwell_fp8": Prior(0.65, 0.4, True),
    "ultra": Prior(1.1, 0.05, False),
    "experts": Prior(0.80, 0.5, True),
    "half_rows": Prior(300.0, 0.7, False),
    "half_width": Prior(300.0, 0.7, False),
    "hopper_scores": Prior(0.55, 0.4, True),
    "blackwell_scores": Prior(0.50, 0.4, True),
    "memory": Prior(0.50, 0.7, True),
    "layer_seconds": Prior(5e-3, 0.5, False),
    "fp8_layer": Prior(1.3, 0.2, False),
    "fixed_layer": Prior(0.5, 0.5, True),
    "captured_layer": Prior(0.1, 1.0, True),
    "captured_memory": Prior(0.8, 0.3, False),
    "grace_layer": Prior(0.6, 0.3, False),
    "stage_seconds": Prior(2e-3, 0.7, False),
    "nvlink": Prior(0.70, 0.4, True),
    "network": Prior(0.80, 0.4, True),
    "plain": Prior(0.7, 0.4, True),
    "exchange_hidden": Prior(0.30, 0.8, True),
    "overlap_hidden": Prior(0.80, 0.5, True),
    "gradients_hidden": Prior(0.70, 0.7, True),
    "community": Prior(1.3, 0.3, False),
    "natural": Prior(1.3, 0.2, False),
}
NOISE = 0.10
"""Standard deviation of the logarithm of a good prediction over a measurement: how much a row counts against the priors."""
FREE = tuple(PRIORS)


def main() -> None:
    rows = [row for row in measured() if row.open]
    found = dataclasses.replace(fit(rows), **ranges(rows, errors_when_left_out(rows)))
    text = write_coefficients("coefficients", dataclasses.asdict(found))
    print(text)


def fit(rows: Sequence[Measured]) -> Coefficients:
    """Returns the coefficients for which the rows and the priors are likeliest, without a range (factors of 1)."""
    start = Coefficients(
        **{name: prior.likely for name, prior in PRIORS.items()}, vendor_low=1, vendor_high=1, community_low=1, community_high=1
    )
    per_configuration = Counter(row.configuration for row in rows)
    weights = np.array([per_configuration[row.configuration] ** -0.5 for row in rows])

    def at(point: np.ndarray) -> Coefficients:
        values = {name: _value(name, number) for name, number in zip(FREE, point, strict=True)}
        return dataclasses.replace(start, **values)

    def errors(point: np.ndarray) -> np.ndarray:
        """Of rows, with large ones damped as in Huber's loss, and of priors: the sum of their squares is minimised."""
        found = weights * log_errors(rows, at(point)) / NOISE
        found = np.sign(found) * np.sqrt(np.where(abs(found) < 2, found**2, 4 * abs(found) - 4))
        return np.concatenate([found, point])

    return at(least_squares(errors, np.zeros(len(FREE))))


def log_errors(rows: Sequence[Measured], using: Coefficients) -> np.ndarray:
    """Returns the logarithm of predicted over measured of each row."""
    return np.array([math.log(seconds(row.counts, row.cluster, row.software, using).likely / row.seconds) for row in rows])


def errors_when_left_out(rows: Sequence[Measured], parts: int = 6) -> np.ndarray:
    """Returns `log_errors` of each row, by coefficients that were fitted without its configuration and some others."""
    part = np.array([hashlib.sha256(f"part {row.configuration}".encode()).digest()[0] % parts for row in rows])
    found = np.zeros(len(rows))
    for left_out in range(parts):
        using = fit([row for row, number in zip(rows, part, strict=True) if number != left_out])
        found[part == left_out] = log_errors([row for row, number in zip(rows, part, strict=True) if number == left_out], using)
    return found


def ranges(rows: Sequence[Measured], errors: np.ndarray) -> dict[str, float]:
    """Returns factors from the likely seconds to the ends of a range that holds nine of ten of these rows, for each tuning."""
    found = {}
    for tuning in (Tuning.vendor, Tuning.community):
        of = errors[[row.software.tuning is tuning for row in rows]]
        found[f"{tuning.value}_low"], found[f"{tuning.value}_high"] = np.exp(-np.quantile(of, [0.95, 0.05]))
    return {name: float(factor) for name, factor in found.items()}


def _value(name: str, number: float) -> float:
    """Returns the coefficient that is `number` standard deviations from its prior."""
    prior = PRIORS[name]
    if not prior.share:
        return prior.likely * math.exp(prior.spread * number)
    return 1 / (1 + math.exp(-(math.log(prior.likely / (1 - prior.likely)) + prior.spread * number)))


def least_squares(errors: Callable[[np.ndarray], np.ndarray], point: np.ndarray, rounds: int = 60) -> np.ndarray:
    """Returns a local minimum of the sum of squares (Levenberg 1944, Marquardt 1963), with derivatives by differences."""
    damping, found = 1.0, errors(point)
    for _ in range(rounds):
        slopes = np.stack([(errors(point + 1e-4 * unit) - found) / 1e-4 for unit in np.eye(len(point))], axis=1)
        while damping < 1e8:
            step = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(point)), -slopes.T @ found)
            tried = errors(point + step)
            if tried @ tried < found @ found:
                break
            damping *= 4
        else:
            break
        small = found @ found - tried @ tried < 1e-6 * (found @ found)
        point, found, damping = point + step, tried, damping / 4
        if small:
            break
    return point


if __name__ == "__main__":
    main()
