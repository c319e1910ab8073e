"""The walkthrough and the five paths name functions that are in the files they name; the walkthrough has at most 30 files and the
sizes of the default run."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenyard.train.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "walkthrough.md").read_text()
PATHS = (ROOT / "docs" / "paths.md").read_text()


class Section(NamedTuple):
    """A stop of the walkthrough, or one of the five paths."""

    number: int
    names: list[tuple[str, list[str]]]
    """Each file in the lists of the section, and the functions that it names there."""
    files: set[str]
    """All files that the section names."""
    mentioned: list[str]
    """The functions that the text of the section writes as `name()`."""


def sections(text: str) -> list[Section]:
    parts = re.split(r"^## (\d+)\. .*$", text, flags=re.M)[1:]
    return [
        Section(int(number), listed(part), files_in(part), re.findall(r"`(\w+)\(\)`", part))
        for number, part in zip(parts[::2], parts[1::2], strict=True)
    ]


def listed(text: str) -> list[tuple[str, list[str]]]:
    lines = re.findall(r"^- \[(.+?)\]\((.+?)\): (.*)$", text, re.M)
    assert all(f"../{name}" == link for name, link, _ in lines), lines
    return [(name, re.findall(r"`([\w.]+)`", names)) for name, _, names in lines]


def files_in(text: str) -> set[str]:
    return set(re.findall(r"\(\.\./([\w/]+\.py)\)", text))


def defined(path: str) -> set[str]:
    """Functions and classes of a file, methods with their class in front."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return found


def test_there_are_twelve_stops_and_five_paths() -> None:
    assert [stop.number for stop in sections(TEXT)] == list(range(1, 13))
    assert [path.number for path in sections(PATHS)] == list(range(1, 6))


def test_there_are_at_most_thirty_files() -> None:
    assert len(files_in(TEXT)) <= 30


@pytest.mark.parametrize("section", [*sections(TEXT), *sections(PATHS)], ids=lambda section: str(section.number))
def test_every_name_is_in_its_file(section: Section) -> None:
    assert section.names and all(names for _, names in section.names)
    assert [(path, name) for path, names in section.names for name in names if name not in defined(path)] == []
    here = {name.rpartition(".")[2] for path in section.files for name in defined(path)}
    assert [name for name in section.mentioned if name not in here] == []


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
