"""Generates docs/configuration.md from the dataclasses: python -m tokenyard.train.config.reference > docs/configuration.md"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from operator import attrgetter
from pathlib import Path

from ...ranges import ranges
from .config import Config
from .gpus import CATALOGUE
from .schema import is_mapping, settings, written

CONF = Path(__file__).resolve().parents[2] / "conf"

INTRODUCTION = """\
# Configuration

This file is written by `python -m tokenyard.train.config.reference > docs/configuration.md`; change the dataclasses, not this file.

`tokenyard train` takes options of groups (`group=option`) and settings (`key=value`). An option is a YAML file in `conf/`
that changes some settings; a setting on the command line overrides all options. An interval includes a bound that is written
with `[` or `]`. The meaning of `null` is in the sentence of each setting."""


def main() -> None:
    sys.stdout.write(reference())


def reference() -> str:
    """Returns the whole document."""
    return (
        "\n".join([INTRODUCTION, "", "## Groups and their options", "", *group_rows(), "", "## Settings", *section_lines()]) + "\n"
    )


def group_rows() -> Iterator[str]:
    """Yields a table of all options, with the comment at the top of their files."""
    yield from table("option", "what it is for")
    for path in sorted(path for path in CONF.glob("*/*.yaml") if path.parent != CATALOGUE):
        yield row(f"`{path.parent.name}={path.stem}`", comment(path.read_text()))


def comment(text: str) -> str:
    """Returns the first comment of a YAML file, except for Hydra's @package."""
    comments = (line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if not line.startswith("@package")), "")


def section_lines() -> Iterator[str]:
    """Yields a table for each section, in the order of the fields; settings outside of sections come first."""
    for prefix, cls in sections():
        sentences = docstrings(cls)
        leaves = [name for name in sentences if not dataclasses.is_dataclass(settings()[prefix + name][0])]
        yield from ["", f"### {prefix.removesuffix('.') or 'the run'}", "", *table("setting", "value", "default", "meaning")]
        for name in leaves:
            key = prefix + name
            yield row(f"`{key}`", values(key), f"`{written(attrgetter(key)(Config()))}`", sentences[name])


def sections() -> Iterator[tuple[str, type]]:
    """Yields the dataclasses of the configuration, each with the prefix of its keys."""
    yield "", Config
    for key, (kind, _) in settings().items():
        if dataclasses.is_dataclass(kind):
            yield f"{key}.", kind


def docstrings(cls: type) -> dict[str, str]:
    """Returns the string below each field of a dataclass, read from the source; empty if there is none."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(node.body, [*node.body[1:], ast.Pass()], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = sentence(following)
    return found


def sentence(node: ast.stmt) -> str:
    """Returns the text of a statement that is a string, on one line; empty for other statements."""
    is_string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return " ".join(ast.literal_eval(node.value).split()) if isinstance(node, ast.Expr) and is_string else ""


def values(key: str) -> str:
    """Returns the values that the setting may have."""
    kind, optional = settings()[key]
    if kind is bool:
        text = "true, false"
    elif isinstance(kind, type) and issubclass(kind, Enum):
        text = ", ".join(kind.__members__)
    else:
        words = {int: "integer", float: "number", str: "text", list[int]: "list of integers", list[float]: "list of numbers"}
        text = words.get(kind, "mapping" if is_mapping(key) else "list of text")
    text += f" in {ranges(Config)[key]}" if key in ranges(Config) else ""
    return f"{text}, or null" if optional else text


def table(*names: str) -> list[str]:
    return [row(*names), row(*("---" for _ in names))]


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main()
