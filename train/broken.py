"""What a rule between settings says when it does not hold."""

from collections.abc import Iterable
from typing import NamedTuple


class Broken(NamedTuple):
    """A rule that does not hold: `key` is the setting to change, `candidates` the values that may mend it."""

    key: str
    rule: str
    candidates: Iterable[object]
    place: int = 0
    """Which of RULES it is."""
