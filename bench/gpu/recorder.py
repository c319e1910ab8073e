"""What a part tells: records, one JSON object each, written as soon as they are known, so that what ends a part loses nothing."""

import json
import math
from time import monotonic
from typing import IO, Any

import torch


class Unavailable(Exception):
    """What cannot run here, and why."""


class Recorder:
    """A part's way out, and what it should know: device, scale, and how much time it has left."""

    def __init__(self, out: IO[str], device: torch.device, scale: str, seconds: float) -> None:
        self.out, self.device, self.scale = out, device, scale
        self.end = monotonic() + seconds

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def remaining(self) -> float:
        """Seconds until this part is ended."""
        return self.end - monotonic()

    def check(self, name: str, ok: bool, text: str = "") -> None:
        """Something is as it has to be, or not; `text` says by how much."""
        self._tell("check", name=name, ok=bool(ok), text=text)

    def below(self, name: str, value: float, limit: float, text: str = "") -> None:
        """A check that `value` is at most `limit`; one that is not a number fails."""
        known = value if math.isfinite(value) else 1e300  # JSON has no infinity
        shown = f"{value:.1e}, at most {limit:.1e} is allowed{f'; {text}' if text else ''}"
        self._tell("check", name=name, ok=value <= limit, value=known, limit=limit, text=shown)

    def skip(self, name: str, why: str) -> None:
        self._tell("skip", name=name, text=why)

    def fact(self, name: str, value: Any) -> None:
        """Something to know, plain JSON."""
        self._tell("fact", name=name, value=value)

    def row(self, table: str, **cells: Any) -> None:
        """A line of a table: plain JSON by column."""
        self._tell("row", table=table, cells=cells)

    def _tell(self, kind: str, **record: Any) -> None:
        print(json.dumps({"kind": kind, **record}), file=self.out, flush=True)
