"""What one rank does, holds and sends as the world grows, counted without the ranks."""

import sys
from collections.abc import Callable


def print_figures(figures: Callable[[int], dict[str, float]]) -> None:
    """Prints the figures of a topic for the worlds of the command line."""
    for world in map(int, sys.argv[1:] or ["64", "512", "2048"]):
        print(f"{world} ranks")
        for name, figure in figures(world).items():
            print(f"  {name:55} {figure:14,.3f}")
