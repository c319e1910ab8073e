"""The configuration against the rules of rules.py and the file system, before any process group exists."""

import copy
import math
from operator import attrgetter
from typing import NamedTuple

from ...parallel.layout import fewest_ranks
from .config import Config, ConfigError
from .rules.rule import Broken
from .rules.rules import broken_rules
from .schema import written


def check_rules(config: Config, world: int) -> None:
    """ConfigError for the first rule that `config` breaks on `world` ranks, with the nearest value that breaks none."""
    broken = next(broken_rules(config, world), None)
    if broken is not None:
        value = attrgetter(broken.key)(config)
        raise ConfigError.of(broken.key, written(value), broken.rule, nearest_valid(config, world, broken))


def nearest_valid(config: Config, world: int, broken: Broken) -> str:
    """The overrides that mend `broken`: of its candidates those closest to the value, and breaking no other rule if possible."""
    value = attrgetter(broken.key)(config)
    fixes = [fix for candidate in broken.candidates if (fix := _try(config, world, broken, candidate)) is not None]
    whole = [fix for fix in fixes if fix.valid] or fixes or [Fix(attrgetter(broken.key)(Config()), world, False)]
    least = min(_distance(value, fix.value) for fix in whole)
    best = sorted(
        {fix.written(broken.key, world) for fix in whole if _distance(value, fix.value) == least}, key=lambda fix: (len(fix), fix)
    )
    return " or ".join(best)


class Fix(NamedTuple):
    """A value that mends a rule on `world` ranks, and whether all other rules hold then as well."""

    value: object
    world: int
    valid: bool

    def written(self, key: str, world: int) -> str:
        started = "" if self.world == world else f" launch=torchrun launch.ranks={self.world}"
        return f"{key}={written(self.value)}{started}"


def _try(config: Config, world: int, broken: Broken, candidate: object) -> Fix | None:
    """None if the rule stays broken."""
    changed = copy.deepcopy(config)
    section, _, name = broken.key.rpartition(".")
    setattr(attrgetter(section)(changed) if section else changed, name, candidate)
    mended = None
    for size in _worlds(changed, world, broken.key):
        left = next(broken_rules(changed, size), None)
        if left is None:
            return Fix(candidate, size, True)
        later = left.place > broken.place or (left.place == broken.place and left.key != broken.key)
        if mended is None and later:
            mended = Fix(candidate, size, False)
    return mended


def _worlds(config: Config, world: int, key: str) -> list[int]:
    """A single process can be asked to start ranks: the numbers of ranks to try when a parallel degree is at fault."""
    unit = fewest_ranks(config.parallel)
    if world > 1 or not key.startswith("parallel."):
        return [world]
    return [unit * multiple for multiple in range(1, 5)]


def _distance(value: object, candidate: object) -> float:
    if isinstance(value, int | float) and isinstance(candidate, int | float) and math.isfinite(value):
        return abs(value - candidate)
    return 0.0
