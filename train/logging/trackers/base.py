"""The interface of a tracker: one service or file format that shows a run."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class AbstractTracker(ABC):
    """One service or file format. Its methods are called one after another from one thread that is not the main thread."""

    name: str

    @abstractmethod
    def start(self, facts: Mapping[str, Any]) -> None:
        """Opens the run. `facts`: the configuration and what else identifies the run, as nested mappings of plain values."""

    @abstractmethod
    def log(self, record: Mapping[str, Any]) -> None:
        """Shows a record of metrics.jsonl by the sections of sections.py; its `step` is the axis."""

    def console(self, text: str) -> None:  # noqa: B027
        """Shows a line of the console, where the service can."""

    def hint(self) -> str | None:
        """Returns what to do with a run that has finished, in one line."""
        return None

    @abstractmethod
    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Closes the run with the numbers that summarize it."""

    def telemetry(self, record: Mapping[str, Any]) -> None:  # noqa: B027
        """Shows pictures of a record of telemetry.jsonl, where the service can."""

    def alert(self, kind: str, text: str) -> None:  # noqa: B027
        """Notifies people at once, where the service can; expert_stats/alerts.py has the titles of the kinds."""

    def sample(self, step: int, prompt: str, text: str) -> None:  # noqa: B027
        """Shows what the model wrote after a prompt."""


def summary_text(facts: Mapping[str, Any]) -> str:
    """Returns nested facts as an indented JSON block of Markdown."""
    return "".join(f"    {line}\n" for line in json.dumps(facts, indent=2, default=str).splitlines())
