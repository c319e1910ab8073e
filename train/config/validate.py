"""Checks a configuration against the rules of rules.py, and finds the nearest value that violates none."""

import copy
import math
from operator import attrgetter
from typing import NamedTuple

from ...parallel.layout import fewest_ranks
from .config import Config, ConfigError
from .rules.rule import Violation
from .rules.rules import violations
from .schema import written


def check_rules(config: Config, world: int) -> None:
    """Raises ConfigError for the first rule that `config` violates on `world` ranks, with the nearest value that violates none."""
    violation = next(violations(config, world), None)
    if violation is not None:
        value = attrgetter(violation.key)(config)
        raise ConfigError.of(violation.key, written(value), violation.rule, nearest_valid(config, world, violation))


def nearest_valid(config: Config, world: int, violation: Violation) -> str:
    """Returns the overrides that fix `violation`: the candidates closest to the value that violate no other rule, if any."""
    value = attrgetter(violation.key)(config)
    fixes = [fix for candidate in violation.candidates if (fix := _try(config, world, violation, candidate)) is not None]
    valid = [fix for fix in fixes if fix.valid] or fixes or [Fix(attrgetter(violation.key)(Config()), world, False)]
    smallest = min(_distance(value, fix.value) for fix in valid)
    best = sorted(
        {fix.overrides(violation.key, world) for fix in valid if _distance(value, fix.value) == smallest},
        key=lambda fix: (len(fix), fix),
    )
    return " or ".join(best)


class Fix(NamedTuple):
    """A value that fixes a violation on `world` ranks, and whether all other rules hold then as well."""

    value: object
    world: int
    valid: bool

    def overrides(self, key: str, world: int) -> str:
        started = "" if self.world == world else f" launch=torchrun launch.ranks={self.world}"
        return f"{key}={written(self.value)}{started}"


def _try(config: Config, world: int, violation: Violation, candidate: object) -> Fix | None:
    """Returns the fix by this candidate; None if the rule stays violated."""
    changed = copy.deepcopy(config)
    section, _, name = violation.key.rpartition(".")
    setattr(attrgetter(section)(changed) if section else changed, name, candidate)
    fixed = None
    for size in _worlds(changed, world, violation.key):
        remaining = next(violations(changed, size), None)
        if remaining is None:
            return Fix(candidate, size, True)
        later = remaining.place > violation.place or (remaining.place == violation.place and remaining.key != violation.key)
        if fixed is None and later:
            fixed = Fix(candidate, size, False)
    return fixed


def _worlds(config: Config, world: int, key: str) -> list[int]:
    """Numbers of ranks to try: a single process could start ranks, so for a parallel degree the first multiples that fit it."""
    unit = fewest_ranks(config.parallel)
    if world > 1 or not key.startswith("parallel."):
        return [world]
    return [unit * multiple for multiple in range(1, 5)]


def _distance(value: object, candidate: object) -> float:
    if isinstance(value, int | float) and isinstance(candidate, int | float) and math.isfinite(value):
        return abs(value - candidate)
    return 0.0
