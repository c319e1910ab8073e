"""The documents of a corpus and their split into training and validation."""

import logging
from collections.abc import Iterator
from typing import Literal, NamedTuple

import xxhash

from .check import check_corpus
from .config import DataConfig
from .sources import Source, open_source

Split = Literal["train", "validation"]
log = logging.getLogger("tokenyard")


class Document(NamedTuple):
    name: str
    text: str


def documents(config: DataConfig, split: Split) -> Iterator[Document]:
    """The documents of one split in the order of their names."""
    corpus = survey(config)
    return map(corpus.read, corpus.names(split))


class Corpus(NamedTuple):
    """What one pass over a source found. Documents are read again when needed, so a corpus need not fit in memory."""

    source: Source
    train: list[str]
    validation: list[str]
    undecodable: list[str]
    """Names of what is not UTF-8."""
    duplicates: int
    """Documents with exactly the text of an earlier one."""
    empty: int
    """Documents of nothing but white space."""
    fingerprints: dict[str, str]
    """xxh3-128 over names and texts, for each split."""

    def names(self, split: Split) -> list[str]:
        return self.train if split == "train" else self.validation

    def read(self, name: str) -> Document:
        return Document(name, self.source.read(name).decode())


def survey(config: DataConfig) -> Corpus:
    """Read everything once: leave out what is no text or was there before, and split the rest by a hash of the name alone.

    Exact duplicates go before the split, so no validation text is in the training documents.
    Raises a ValueError of one line when the settings name no text or leave a split empty.
    """
    check_corpus(config)
    corpus = Corpus(open_source(config), [], [], [], 0, 0, {})
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
            split: Split = "validation" if place(name) < config.validation_fraction else "train"
            corpus.names(split).append(name)
            hashes[split].update(_raw(name) + b"\0" + digest)
    _refuse_empty_split(config, corpus)
    _report(corpus.undecodable, duplicates, empty)
    fingerprints = {split: running.hexdigest() for split, running in hashes.items()}
    return corpus._replace(duplicates=duplicates, empty=empty, fingerprints=fingerprints)


def place(name: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the name and the seed alone."""
    return xxhash.xxh3_64_intdigest(_raw(name), seed) / 2**64


def _raw(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names need not be UTF-8


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _refuse_empty_split(config: DataConfig, corpus: Corpus) -> None:
    places = sorted(map(place, corpus.train + corpus.validation))
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
