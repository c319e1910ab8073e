"""The records of a part, one JSON object each. They are written at once, so a part that is killed loses none."""

import json
import math
from time import monotonic
from typing import IO, Any

import torch


class Unavailable(Exception):
    """A part cannot run here; the message says why."""


class Recorder:
    """Writes the records of a part to `out`, and holds its device, scale and remaining time."""

    def __init__(self, out: IO[str], device: torch.device, scale: str, seconds: float) -> None:
        self.out, self.device, self.scale = out, device, scale
        self.end = monotonic() + seconds

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def remaining(self) -> float:
        """Seconds until the part is killed."""
        return self.end - monotonic()

    def check(self, name: str, ok: bool, text: str = "") -> None:
        """A check that passed or failed; `text` gives details."""
        self._write("check", name=name, ok=bool(ok), text=text)

    def below(self, name: str, value: float, limit: float, text: str = "") -> None:
        """A check that `value` is at most `limit`; NaN fails."""
        known = value if math.isfinite(value) else 1e300  # JSON has no infinity
        shown = f"{value:.1e}, at most {limit:.1e} is allowed{f'; {text}' if text else ''}"
        self._write("check", name=name, ok=value <= limit, value=known, limit=limit, text=shown)

    def skip(self, name: str, why: str) -> None:
        self._write("skip", name=name, text=why)

    def fact(self, name: str, value: Any) -> None:
        """A fact to report, plain JSON."""
        self._write("fact", name=name, value=value)

    def row(self, table: str, **cells: Any) -> None:
        """A row of a table: plain JSON by column."""
        self._write("row", table=table, cells=cells)

    def _write(self, kind: str, **record: Any) -> None:
        print(json.dumps({"kind": kind, **record}), file=self.out, flush=True)
