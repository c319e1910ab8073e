"""Where documents come from: a folder of files, one file cut into chunks, a grammar.

A source names its documents and reads one by its name; what is done with them is the same for all. A new kind of source
(streams, mixtures, shards) is another class here and another case in `open_source`.
"""

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import final

from .check import pattern_files, stdlib_files, stdlib_root
from .config import Corpus, DataConfig


def open_source(config: DataConfig) -> "Source":
    """The source that `config` describes; the settings were checked by `check_corpus`."""
    match config.corpus:
        case Corpus.stdlib:
            return Folder(stdlib_root(), sorted(stdlib_files(stdlib_root())))
        case Corpus.synthetic:
            return Grammar(config.synthetic_documents)
        case Corpus.text:
            assert config.path is not None
            path = Path(config.path).expanduser()
            return Folder(path, sorted(pattern_files(path, config.pattern))) if path.is_dir() else Chunks(path)
        case _:
            raise AssertionError(f"{config.corpus} is no corpus of documents")


class Source(ABC):
    @abstractmethod
    def names(self) -> list[str]:
        """The names of all documents, sorted; they do not depend on where the corpus lies."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The document of that name, as stored."""


@final
class Folder(Source):
    """One document per file; its name is the path below the folder."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self._root = root
        self._files = files

    def names(self) -> list[str]:
        return self._files

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


@final
class Chunks(Source):
    """One text file, cut before lines that follow a blank line so that it has documents to keep for validation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places = {f"{path.name}#{index:08d}": place for index, place in enumerate(_cut(path))}

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _cut(path: Path) -> list[tuple[int, int]]:
    """Offset and size in bytes of each chunk; together they are the whole file."""
    least = min(max(path.stat().st_size // 256, 256), 4096)
    places, start, at, blank = [], 0, 0, False
    with path.open("rb") as file:
        for line in file:
            size = at - start
            # Text without blank lines is cut at line ends, or one file would be one document.
            if line.strip() and ((size >= least and blank) or size >= 16 * least):
                places.append((start, size))
                start = at
            blank = not line.strip()
            at += len(line)
    return [*places, (start, at - start)]


@final
class Grammar(Source):
    """Small stories that a small model learns: who holds how much of what, and the sum."""

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def names(self) -> list[str]:
        return [f"story{index:08d}" for index in range(self._documents)]

    def read(self, name: str) -> bytes:
        chance = random.Random(name)  # seeded by text: the same in every process and Python version
        return "".join(_story(chance) for _ in range(4 + _below(chance, 12))).encode()


def _story(chance: random.Random) -> str:
    who, thing, color = (_pick(chance, words) for words in (WHO, THINGS, COLORS))
    some, more = 1 + _below(chance, 9), 1 + _below(chance, 9)
    verb, total = ("finds", some + more) if _below(chance, 2) else ("loses", max(some - more, 0))
    return (
        f"{who} has {some} {color} {thing}s. {who} {verb} {more} {color} {thing}s.\n"
        f"How many {color} {thing}s has {who} now? {who} has {total} {color} {thing}s.\n\n"
    )


def _pick(chance: random.Random, words: str) -> str:
    choices = words.split()
    return choices[_below(chance, len(choices))]


def _below(chance: random.Random, limit: int) -> int:
    # Of random.Random only random() promises the same numbers in every version of Python.
    return int(chance.random() * limit)


WHO = "Ada Ben Chen Dora Emil Fatima Goran Hana Ines Jonas Kira Luis Mina Noor Otto Priya"
THINGS = "apple button coin drum egg fig goat hat kite lamp marble nail pebble rope shell ticket"
COLORS = "red blue green yellow black white brown grey"
