"""The documents of a corpus and their split into training and validation."""

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, final

import xxhash

from .checks import check_corpus, pattern_files, stdlib_files, stdlib_root
from .config import Corpus, DataConfig

# Sources of documents. A new kind of source that is not streamed is another class here and another case in `open_source`.


def open_source(config: DataConfig) -> "DocumentSource":
    """Returns the source that `config` describes. Call `check_corpus` before."""
    match config.corpus:
        case Corpus.stdlib:
            return TextFolder(stdlib_root(), sorted(stdlib_files(stdlib_root())))
        case Corpus.synthetic:
            return Grammar(config.synthetic_documents)
        case Corpus.text:
            assert config.path is not None
            path = Path(config.path).expanduser()
            return TextFolder(path, sorted(pattern_files(path, config.pattern))) if path.is_dir() else Chunks(path)
        case _:
            raise AssertionError(f"{config.corpus} is no corpus of documents")


class DocumentSource(ABC):
    @abstractmethod
    def names(self) -> list[str]:
        """Returns the names of all documents, sorted; independent of where the corpus lies."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Returns the bytes of the document `name`."""


@final
class TextFolder(DocumentSource):
    """One document per file, named by its path relative to the folder."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self._root = root
        self._files = files

    def names(self) -> list[str]:
        return self._files

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()


@final
class Chunks(DocumentSource):
    """One text file, cut before lines that follow a blank line, so that there are documents for validation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spans = {f"{path.name}#{index:08d}": place for index, place in enumerate(_cut(path))}

    def names(self) -> list[str]:
        return list(self._spans)

    def read(self, name: str) -> bytes:
        offset, size = self._spans[name]
        with self._path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


def _cut(path: Path) -> list[tuple[int, int]]:
    """Returns offset and size in bytes of each chunk; together they are the whole file."""
    least = min(max(path.stat().st_size // 256, 256), 4096)
    places, start, at, blank = [], 0, 0, False
    with path.open("rb") as file:
        for line in file:
            size = at - start
            # Text without blank lines is cut at line ends: otherwise the file would be one document.
            if line.strip() and ((size >= least and blank) or size >= 16 * least):
                places.append((start, size))
                start = at
            blank = not line.strip()
            at += len(line)
    return [*places, (start, at - start)]


@final
class Grammar(DocumentSource):
    """Generates small stories that a small model can learn: who has how many things, and the sum."""

    def __init__(self, documents: int) -> None:
        self._documents = documents

    def names(self) -> list[str]:
        return [f"story{index:08d}" for index in range(self._documents)]

    def read(self, name: str) -> bytes:
        chance = random.Random(name)  # seeded by text: the same in every process and Python version
        return "".join(_story(chance) for _ in range(4 + _below(chance, 12))).encode()


def _story(chance: random.Random) -> str:
    who, thing, color = (words[_below(chance, len(words))] for words in map(str.split, (WHO, THINGS, COLORS)))
    some, more = 1 + _below(chance, 9), 1 + _below(chance, 9)
    verb, total = ("finds", some + more) if _below(chance, 2) else ("loses", max(some - more, 0))
    return (
        f"{who} has {some} {color} {thing}s. {who} {verb} {more} {color} {thing}s.\n"
        f"How many {color} {thing}s has {who} now? {who} has {total} {color} {thing}s.\n\n"
    )


def _below(chance: random.Random, limit: int) -> int:
    # Only random() of random.Random gives the same numbers in every version of Python.
    return int(chance.random() * limit)


WHO = "Ada Ben Chen Dora Emil Fatima Goran Hana Ines Jonas Kira Luis Mina Noor Otto Priya"
THINGS = "apple button coin drum egg fig goat hat kite lamp marble nail pebble rope shell ticket"
COLORS = "red blue green yellow black white brown grey"


Split = Literal["train", "validation"]
log = logging.getLogger("tokenyard")


class Document(NamedTuple):
    name: str
    text: str


def documents(config: DataConfig, split: Split) -> Iterator[Document]:
    """Yields the documents of one split, in the order of their names."""
    corpus = survey(config)
    return map(corpus.read, corpus.names(split))


class CorpusSurvey(NamedTuple):
    """The result of one pass over a source. Documents are read again when needed, so a corpus need not fit in memory."""

    source: DocumentSource
    train: list[str]
    validation: list[str]
    undecodable: list[str]
    """Names of documents that are not UTF-8."""
    duplicates: int
    """Documents with exactly the text of an earlier one."""
    empty: int
    """Documents of white space alone."""
    fingerprints: dict[str, str]
    """By split: xxh3-128 of names and texts."""

    def names(self, split: Split) -> list[str]:
        return self.train if split == "train" else self.validation

    def read(self, name: str) -> Document:
        return Document(name, self.source.read(name).decode())


def survey(config: DataConfig) -> CorpusSurvey:
    """Reads all documents once, leaves out what is not UTF-8, empty or a duplicate, and splits the rest by a hash of the name.

    Duplicates are removed before the split, so that no validation text is in the training documents.
    Raises ValueError, one line, if the settings name no text or leave a split empty.
    """
    check_corpus(config)
    corpus = CorpusSurvey(open_source(config), [], [], [], 0, 0, {})
    hashes = {"train": xxhash.xxh3_128(), "validation": xxhash.xxh3_128()}
    seen: set[bytes] = set()
    duplicates = empty = 0
    for name in corpus.source.names():
        raw = corpus.source.read(name)
        digest = xxhash.xxh3_128_digest(raw)
        if not _is_text(raw):
            corpus.undecodable.append(name)
        elif not raw.strip():
            empty += 1
        elif digest in seen:
            duplicates += 1
        else:
            seen.add(digest)
            split: Split = "validation" if unit_hash(name) < config.validation_fraction else "train"
            corpus.names(split).append(name)
            hashes[split].update(_raw(name) + b"\0" + digest)
    _refuse_empty_split(config, corpus)
    _report(corpus.undecodable, duplicates, empty)
    fingerprints = {split: running.hexdigest() for split, running in hashes.items()}
    return corpus._replace(duplicates=duplicates, empty=empty, fingerprints=fingerprints)


def unit_hash(name: str, seed: int = 0) -> float:
    """Returns a hash in [0, 1) of the name and the seed."""
    return xxhash.xxh3_64_intdigest(_raw(name), seed) / 2**64


def _raw(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names need not be UTF-8


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse_empty_split(config: DataConfig, corpus: CorpusSurvey) -> None:
    places = sorted(map(unit_hash, corpus.train + corpus.validation))
    if len(places) < 2:
        what = f"data.path={config.path}" if config.path else f"data.corpus={config.corpus.value}"
        raise ValueError(f"{what} must have a document for each split; it has {len(places)} and the least is 2")
    if not (corpus.train and corpus.validation):
        empty = "training" if corpus.validation else "validation"
        rule = f"leaves no {empty} document of {len(places)}"
        nearest = (places[-2] + places[-1]) / 2 if corpus.validation else (places[0] + places[1]) / 2
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction} {rule}; the nearest value that does not is {nearest:.6g}"
        )


def _report(undecodable: list[str], duplicates: int, empty: int) -> None:
    if undecodable or duplicates or empty:
        names = ", ".join(undecodable[:4]) + (", ..." if len(undecodable) > 4 else "")
        listed = f" ({names})" if names else ""
        log.info("data: left out %d not UTF-8%s, %d duplicates, %d empty", len(undecodable), listed, duplicates, empty)
