"""Prints what one rank does, holds and sends in worlds of several sizes: `python -m tokenyard.bench.scale [TOPIC ...]`.

A topic is a module of this folder with a function `figures(world)`, which returns numbers by name, with the unit in the name. Each
call has a process of its own, so that no topic's memory, imports and process groups are in the numbers of another.
"""

import argparse
import json
import pkgutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

WORLDS = (64, 512, 2048)

Figures = dict[str, dict[str, list[float | None]]]
"""By topic and name, one number for each world; None where a topic has no such figure in that world."""


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    found = {topic: collect(topic, arguments.worlds) for topic in arguments.topics}
    print(json.dumps({"worlds": arguments.worlds, **found}, indent=1) if arguments.json else table(found, arguments.worlds))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.scale", description=__doc__)
    known = topics()
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"{', '.join(known)}; all if none is named")
    parser.add_argument("--worlds", type=_worlds, default=list(WORLDS), help="numbers of ranks, with commas (64,512,2048)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    unknown = [topic for topic in arguments.topics if topic not in known]
    if unknown:
        parser.error(f"TOPIC={unknown[0]}: must be one of {', '.join(known)}")
    arguments.topics = arguments.topics or known
    return arguments


def topics() -> list[str]:
    """Returns the names of the modules beside this one."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "__main__")


def collect(topic: str, worlds: Sequence[int]) -> dict[str, list[float | None]]:
    """Returns the figures of a topic by name, one for each world."""
    module = import_module(f".{topic}", __package__)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        of_worlds: list[dict[str, float]] = list(processes.map(module.figures, worlds))
    names = dict.fromkeys(name for figures in of_worlds for name in figures)
    return {name: [figures.get(name) for figures in of_worlds] for name in names}


def table(found: Figures, worlds: Sequence[int]) -> str:
    """Returns a line for each figure and a column for each world."""
    rows = [["", *(f"{world:,} ranks" for world in worlds)]]
    for topic, figures in found.items():
        rows += [[topic, *[""] * len(worlds)], *([f"  {name}", *map(_cell, values)] for name, values in figures.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def _cell(value: float | None) -> str:
    """Whole numbers in full, others with three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"


def _worlds(text: str) -> list[int]:
    return [int(world) for world in text.split(",")]


if __name__ == "__main__":
    main()
