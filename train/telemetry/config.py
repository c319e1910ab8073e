"""How closely the experts are watched."""

from dataclasses import dataclass
from enum import Enum


class Tier(Enum):
    none = "none"
    brief = "brief"
    detailed = "detailed"


@dataclass
class TelemetryConfig:
    tier: Tier = Tier.brief
    """none: load and drops alone; brief: at most 25 moe/ keys; detailed: also a few for each layer, and more probes and images."""
    every: int = 25
    """Steps between records of telemetry.jsonl; there is one with each evaluation and checkpoint too."""
    probe: int = 4
    """Validation sequences that are routed to see how experts specialise: at evaluations, in detailed more often; 0 for none."""
    probe_every: int = 200
    """Steps between these in tier detailed, beside those at evaluations; 0 for none."""
    window: int = 100
    """An expert is dead that got no token for so many steps."""
