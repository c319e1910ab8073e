"""The walkthrough names at most 30 files, its functions are in the files it names, and its sizes are those of the default run."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenyard.train.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "walkthrough.md").read_text()


class Stop(NamedTuple):
    number: int
    names: dict[str, list[str]]
    """From each file in the list at the top of the stop to the functions that it names there."""
    mentioned: list[str]
    """The functions that the text of the stop writes as `name()`."""


def stops() -> list[Stop]:
    parts = re.split(r"^## (\d+)\. .*$", TEXT, flags=re.M)[1:]
    return [
        Stop(int(number), listed(text), re.findall(r"`(\w+)\(\)`", text))
        for number, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def listed(text: str) -> dict[str, list[str]]:
    lines = re.findall(r"^- \[(.+?)\]\((.+?)\): (.*)$", text, re.M)
    assert all(f"../{name}" == link for name, link, _ in lines), lines
    return {name: re.findall(r"`([\w.]+)`", names) for name, _, names in lines}


def defined(path: str) -> set[str]:
    """Functions and classes of a file, methods with their class in front."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_there_are_twelve() -> None:
    assert [stop.number for stop in stops()] == list(range(1, 13))


def test_there_are_at_most_thirty_files() -> None:
    files = set(re.findall(r"\(\.\./([\w/]+\.py)\)", TEXT))
    assert files >= {path for stop in stops() for path in stop.names}
    assert len(files) <= 30


@pytest.mark.parametrize("stop", stops(), ids=lambda stop: str(stop.number))
def test_every_name_is_in_its_file(stop: Stop) -> None:
    assert stop.names and all(stop.names.values())
    assert [(path, name) for path, names in stop.names.items() for name in names if name not in defined(path)] == []
    here = {name.rpartition(".")[2] for path in stop.names for name in defined(path)}
    assert [name for name in stop.mentioned if name not in here] == []


def test_sizes_are_those_of_the_default_run() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| ")]
    title, _, *rows = rows
    overrides = re.search(r"`(.*?)`", title[3])
    assert overrides is not None
    sizes = [{letter: int(cells[column]) for letter, _, *cells in rows} for column in (0, 1)]
    assert sizes == [sizes_on(1, []), sizes_on(4, overrides[1].split())]


def sizes_on(ranks: int, overrides: list[str]) -> dict[str, int]:
    config = compose(overrides)
    model, tensor = config.model, config.parallel.tensor
    sequences, part = config.batch.sequences // (ranks // tensor), config.sequence_length // tensor
    return {
        "B": sequences,
        "S": config.sequence_length,
        "s": part,
        "T": sequences * part,
        "D": model.width,
        "H": model.heads // tensor,
        "G": model.kv_heads // tensor,
        "h": model.head_width or model.width // model.heads,
        "V": model.vocabulary // tensor,
        "E": model.moe.experts,
        "K": model.moe.top_k,
        "F": model.moe.hidden,
        "L": sum(model.moe_layer(index) for index in range(model.layers)),
    }
