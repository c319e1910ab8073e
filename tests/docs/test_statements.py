"""Statements of the documents are true: a name beside a file is in that file, a default in a comment of conf/ is the default."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from tokenyard.train.config.compose import CONF, compose
from tokenyard.train.config.gpus import CATALOGUE
from tokenyard.train.config.schema import settings
from tokenyard.train.config.serialize import leaves, plain_config

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = ("bench", "checkpoint", "data", "interop", "launch", "moe", "parallel", "parity", "plan", "report", "train")
OF_OTHERS = {"reshard_after_forward", "trust_remote_code"}
WHOLE = ("experiment", "debug")
"""Groups whose options change settings of any section."""


class Sentence(NamedTuple):
    document: Path
    text: str

    def files(self) -> list[Path]:
        """The Python files that it links to."""
        return [self.document.parent / link for link in re.findall(r"\]\(([^)\s#]+\.py)\)", self.text)]


def sentences() -> Iterator[Sentence]:
    """Sentences of paragraphs and lists, and rows of tables."""
    for document in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
        for block in re.split(r"\n\n|\n(?=[-|]|\d+\. )", prose):
            line = " ".join(block.split())
            for text in [line] if line.startswith("|") else re.split(r"(?<=[.:;]) ", line):
                yield Sentence(document, text)


def test_a_name_beside_a_file_is_in_that_file() -> None:
    checked, wrong = 0, []
    for sentence in sentences():
        code = "\n".join(path.read_text() for path in sentence.files())
        for name in re.findall(r"`([A-Za-z_]\w*)(?:\(\))?`", sentence.text) if code else []:
            checked += 1
            if not re.search(rf"\b{name}\b", code) and name not in OF_OTHERS and name not in settings():
                wrong.append((sentence.document.name, name, sentence.text))
    assert checked > 20
    assert wrong == []


def test_a_name_with_an_underscore_is_in_the_code() -> None:
    """But for the settings of torchtitan, in a table of the README."""
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    words |= {path.stem for path in (ROOT / "conf").rglob("*.yaml")}
    named = {name for sentence in sentences() for name in re.findall(r"`([a-z]\w*_\w+)(?:\(\))?`", sentence.text)}
    theirs = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M))
    assert len(named) > 100
    assert named - theirs - OF_OTHERS - words == set()


def test_a_name_that_is_said_to_be_in_a_file_is_defined_there() -> None:
    """As in: `name` in [file.py](file.py), `name()` of [file.py](file.py)."""
    said = [
        (sentence.document, name, link)
        for sentence in sentences()
        for name, link in re.findall(r"`([A-Za-z_]\w*)(?:\(\))?` (?:in|of) \[[^]]+\]\(([^)\s#]+\.py)\)", sentence.text)
    ]
    assert len(said) > 3
    assert [(document.name, name, link) for document, name, link in said if name not in defined(document.parent / link)] == []


def defined(path: Path) -> set[str]:
    """Functions, classes, methods and constants of a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


OPTIONS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent != CATALOGUE)


@pytest.mark.parametrize("path", OPTIONS, ids=[f"{path.parent.name}={path.stem}" for path in OPTIONS])
def test_numbers_in_a_comment_are_those_of_the_configuration(path: Path) -> None:
    """In files that leave nearly all to the defaults, each number; in the others, each number in a sentence about a default."""
    comment = " ".join(line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    few = len(list(leaves(yaml.safe_load(path.read_text()) or {}))) <= 1
    stated = [text for text in re.split(r"(?<=[.;]) ", comment) if few or "default" in text]
    numbers = {float(number) for text in stated for number in re.findall(r"(?<![\w.:/-])\d+(?:\.\d+)?(?![\w/-])", text)}
    assert numbers - set(values(path.parent.name, path.stem)) == set()


def values(group: str, option: str) -> Iterator[float]:
    """The numbers of the group's section, or of the whole configuration, with the option."""
    plain: Any = plain_config(compose([f"{group}={option}"]))
    for _, value in leaves(plain if group in WHOLE else plain[group]):
        if isinstance(value, int | float):
            yield float(value)
