"""What a tracker is: one service or file format that shows a run."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class AbstractTracker(ABC):
    """One service or file format. Its methods are called one after another from one thread that is not the main thread."""

    name: str

    @abstractmethod
    def start(self, facts: Mapping[str, Any]) -> None:
        """Open the run. `facts`: the configuration and what else identifies the run, as nested mappings of plain values."""

    @abstractmethod
    def log(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl; its `step` is the axis."""

    @abstractmethod
    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Close the run with the numbers that sum it up."""

    def telemetry(self, record: Mapping[str, Any]) -> None:  # noqa: B027
        """Take a record of telemetry.jsonl, for pictures of it. Not every service shows any."""

    def alert(self, kind: str, title: str, text: str) -> None:  # noqa: B027
        """Tell people at once, where the service can."""

    def sample(self, step: int, prompt: str, text: str) -> None:  # noqa: B027
        """What the model wrote after a prompt."""


def summary_text(facts: Mapping[str, Any]) -> str:
    """Nested facts as an indented JSON block of Markdown."""
    return "".join(f"    {line}\n" for line in json.dumps(facts, indent=2, default=str).splitlines())
