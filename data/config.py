"""Settings of the data and the tokenizer."""

import shlex
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

from ..ranges import within


class Corpus(Enum):
    stdlib = "stdlib"
    text = "text"
    synthetic = "synthetic"
    hf = "hf"
    parquet = "parquet"
    jsonl = "jsonl"
    lines = "lines"
    prepared = "prepared"
    mix = "mix"


class Packing(Enum):
    """How documents fill the rows of the training data."""

    concat = "concat"
    best_fit = "best_fit"


STREAMED = (Corpus.hf, Corpus.parquet, Corpus.jsonl, Corpus.lines)
"""Kinds that are read while training; the others are opened whole, as arrays of tokens."""


@dataclass
class DataConfig:
    corpus: Corpus = Corpus.stdlib
    """stdlib: the running interpreter's own standard library; text: files at `path`; synthetic: small stories made by a grammar;
    hf: a data set of the Hugging Face hub; parquet, jsonl, lines: files at `path`, streamed; prepared: what tokenyard prepare wrote
    into `path`; mix: several of those, see `mix`."""
    path: str | None = None
    """A file or a folder; for parquet, jsonl and lines also a pattern or a URL, where {000..127} counts."""
    pattern: str = "**/*.txt"
    """Which files of the folder at `path` are documents of corpus=text."""
    name: str | None = None
    """corpus=hf: the data set on the hub, or a folder that is laid out as one."""
    subset: str | None = None
    """corpus=hf: its configuration."""
    split: str = "train"
    """corpus=hf: its split."""
    revision: str | None = None
    """corpus=hf: commit, branch or tag; null is the newest."""
    column: str = "text"
    """Column (hf, parquet) or key (jsonl) of the text, or of a list of token ids."""
    mix: list[str] = field(default_factory=list)
    """corpus=mix: a text for each source, as 'weight=0.7 corpus=jsonl path=web/*.jsonl.gz repeat=false'; weights are by tokens."""
    repeat: bool = True
    """Start a new epoch at the end of the data; false stops there."""
    validation_fraction: float = field(default=0.05, metadata=within("(0, 1)"))
    """Share of the documents kept for validation, by a hash of the name, or of the text if streamed."""
    cache: str | None = None
    """Folder for trained tokenizers and tokenized corpora; null is $TOKENYARD_CACHE or ~/.cache/tokenyard."""
    synthetic_documents: int = field(default=512, metadata=within("[2, inf)"))
    """Documents of the synthetic corpus."""
    window: int = field(default=256, metadata=within("[1, inf)"))
    """Neighbouring rows of a shard that are read, shuffled and tokenized together."""
    open_shards: int = field(default=8, metadata=within("[1, inf)"))
    """Shards that are read in turn, a window of each; the order of the data depends on it."""
    workers: int = field(default=1, metadata=within("[0, inf)"))
    """Threads of each rank that read and tokenize ahead; 0 reads when a step needs the data."""
    ahead: int = field(default=2, metadata=within("[1, inf)"))
    """Windows of each open shard that are read ahead."""
    longest_row: int = field(default=8_000_000, metadata=within("[1, inf)"))
    """Bytes of a document; a longer one is a bad row."""
    max_bad_fraction: float = field(default=0.001, metadata=within("[0, 1]"))
    """Share of bad rows above which the run stops; until then they are skipped and counted. The first 10 never stop it."""
    max_failed_files: int = field(default=0, metadata=within("[0, inf)"))
    """Files of a source that may fail in an epoch; their rows before the failure are used. One more ends the run, exit code 65."""
    patience_seconds: float = field(default=240.0, metadata=within("[0, inf)"))
    """How long to retry when a source does not answer, before the run stops with a checkpoint and exit code 75."""
    stall_seconds: float = field(default=30.0, metadata=within("(0, inf)"))
    """How long a source may send nothing before the request is retried."""
    allow_change: bool = False
    """Resume from a checkpoint with other data: known sources continue where they were, others start at their beginning."""
    verify: bool = False
    """Check the hash of each prepared shard before it is first read, and of tokens in the cache when they are opened (every rank
    reads them whole). Sizes, and in the cache also times and samples of the bytes, are always checked."""
    mask_documents: bool = False
    """Attention stays inside a document (block-causal), positions restart, and the first token of a document is no target."""
    packing: Packing = Packing.concat
    """concat: documents follow each other and are cut wherever a row ends; best_fit: only documents longer than a row are cut, the
    rest is packed into as few rows as possible, which are padded (not for streamed data; validation rows stay concatenated)."""


class TokenizerKind(Enum):
    sentencepiece = "sentencepiece"
    huggingface = "huggingface"
    bytes = "bytes"


@dataclass
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.sentencepiece
    """sentencepiece: BPE with byte fallback, trained on the training documents at first use; huggingface: a tokenizer.json;
    bytes: 256 bytes and 3 special tokens."""
    path: str | None = None
    """huggingface: a tokenizer.json, a folder with one, or a model of the Hugging Face hub; sentencepiece: a .model file or a
    folder with tokenizer.model, null trains one."""
    end: str | None = None
    """huggingface: the token that ends a document; null is the eos_token, or else the usual ones."""
    begin: str | None = None
    """huggingface: the token that begins documents and prompts; null is the one that the tokenizer puts before a text, '' none."""
    pieces: int = field(default=8192, metadata=within("[260, inf)"))
    """Vocabulary of a tokenizer that is trained here."""
    sample_bytes: int = field(default=6_000_000, metadata=within("[1, inf)"))
    """Bytes of the training documents that it is trained on."""


# The data sources of a configuration: a single one, or the entries of data.mix.

WORDS = ("weight", "label", "corpus", "path", "pattern", "name", "subset", "split", "revision", "column", "repeat")


class MixtureSource(NamedTuple):
    """A source and its share of the tokens."""

    label: str
    weight: float
    config: DataConfig


def mixture_sources(config: DataConfig) -> list[MixtureSource]:
    """Returns the sources of `config`. Raises ValueError, one line, for an entry of data.mix that cannot be parsed."""
    if config.corpus is not Corpus.mix:
        return [MixtureSource(config.corpus.value, 1.0, config)]
    parts = [_parse(entry, config) for entry in config.mix]
    labels = [part.label for part in parts]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"data.mix: two sources are called {label}; give each a label=, as label={label}2")
    return parts


def _parse(entry: str, config: DataConfig) -> MixtureSource:
    split = [word.partition("=") for word in shlex.split(entry)]
    words: dict[str, str] = {key: value for key, _, value in split}
    for key, value in words.items():
        if key not in WORDS or not value:
            raise ValueError(f"data.mix: '{key}={value}' in '{entry}' must be one of {', '.join(WORDS)} and a value")
    weight, label = _weight(words.pop("weight", "1"), entry), words.pop("label", None)
    corpus, repeat = words.pop("corpus", ""), words.pop("repeat", "true")
    single = [kind.value for kind in Corpus if kind is not Corpus.mix]
    if corpus not in single:
        raise ValueError(f"data.mix: corpus={corpus} in '{entry}' must be one of {', '.join(single)}")
    if repeat not in ("true", "false"):
        raise ValueError(f"data.mix: repeat={repeat} in '{entry}' must be true or false")
    plain = replace(config, corpus=Corpus[corpus], mix=[], path=None, name=None, subset=None)
    part = replace(plain, repeat=repeat == "true", **words)  # pyright: ignore[reportArgumentType]
    if not label:  # the last part of its name or path that is not a pattern
        place = part.name or part.path or corpus
        named = [word for word in place.replace("\\", "/").split("/") if word and "*" not in word and "{" not in word]
        label = (named or [corpus])[-1].split(".")[0]
    return MixtureSource(label, weight, part)


def _weight(text: str, entry: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"data.mix: weight={text} in '{entry}' must be a number above 0; the nearest is weight=1")
    return weight
