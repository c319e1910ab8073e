"""`OneLineParser`, whose errors are one line, and the types of numeric arguments."""

import argparse
import sys
from typing import NoReturn, TypeVar

from ..train.config.complain import complain

Number = TypeVar("Number", int, float)


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, as for configuration errors."""

    def error(self, message: str) -> NoReturn:
        verb = self.prog.partition(" ")[2]
        sys.exit(complain(f"{verb}: {message}; see {self.prog} --help"))


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Adds --config-dir, with which the words that are overrides may name options of one's own groups."""
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="folder with groups of your own, as DIR/experiment/mine.yaml")


def with_config_dir(words: list[str], arguments: argparse.Namespace) -> list[str]:
    """Returns words for `parse_arguments`, with the folder of --config-dir."""
    return words if arguments.config_dir is None else [*words, f"--config-dir={arguments.config_dir}"]


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output (docs/conventions.md has its keys)")


def positive(text: str) -> int:
    return _checked(int(text), int(text) >= 1, "must be at least 1")


def not_negative(text: str) -> float:
    return _checked(float(text), 0 <= float(text) < float("inf"), "must be 0 or above")


def port(text: str) -> int:
    return _checked(int(text), 0 <= int(text) < 65536, "must be in [0, 65535]")


def share(text: str) -> float:
    return _checked(float(text), 0 < float(text) <= 1, "must be in (0, 1]")


def _checked(value: Number, holds: bool, rule: str) -> Number:
    if not holds:
        raise argparse.ArgumentTypeError(f"{value} {rule}")
    return value
