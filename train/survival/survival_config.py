"""What a run does about numbers that cannot be right, and what it checks on the way."""

from dataclasses import dataclass
from enum import Enum


class OnFault(Enum):
    """What is done about a step that must not be taken as it is."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnSpike(Enum):
    report = "report"
    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnDivergence(Enum):
    stop = "stop"
    repair = "repair"


@dataclass
class NumericsConfig:
    on_nan: OnFault = OnFault.stop
    """A NaN or infinite loss or gradient, on any rank, twice in a row: stop; skip the update; or rollback to the newest checkpoint
    and jump over the batch."""
    max_skips: int = 8
    """Steps of a run that are skipped or rolled back before it stops all the same."""
    spike_sigma: float | None = 6.0
    """A loss or gradient norm so many standard deviations above those of the last steps is a spike, a norm only if it is also more
    than 3 times their mean; null looks for none."""
    spike_window: int = 128
    """Steps that a spike is compared with; none is looked for before a quarter of them, at least 8."""
    on_spike: OnSpike = OnSpike.report
    """What is done about a spike that comes again when the step is repeated: report updates and says so; else as on_nan."""


@dataclass
class DebugConfig:
    dry_step: bool | None = None
    """Before the first step try the largest batch without an update, a small checkpoint, the disk and the trackers; null: with more
    than one rank, but not when the launcher starts them again."""
    collectives: bool = False
    """Compare (collective, layer, rows) over the ranks before each collective of ours; slow."""
    replicas_every: int = 100
    """Steps between comparisons of the weights that must be equal on several ranks; also before a checkpoint; 0 never."""
    on_divergence: OnDivergence = OnDivergence.repair
    """When they differ: repair copies them from the majority, and stops if there is none or the same rank differs again."""
    stragglers_every: int = 10
    """Steps between comparisons of the ranks' own time; 0 never."""
