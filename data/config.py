"""Which text is trained on and how it becomes tokens."""

from dataclasses import dataclass
from enum import Enum


class Corpus(Enum):
    stdlib = "stdlib"
    text = "text"
    synthetic = "synthetic"


@dataclass
class DataConfig:
    corpus: Corpus = Corpus.stdlib
    """stdlib: the running interpreter's own standard library; text: files at `path`; synthetic: small stories made by a grammar."""
    path: str | None = None
    """A text file, or a folder of text files (one document each); for corpus=text."""
    pattern: str = "**/*.txt"
    """Which files of the folder at `path` are documents."""
    validation_fraction: float = 0.05
    """Share of the documents kept for validation, chosen by a hash of the document's name."""
    cache: str | None = None
    """Folder for trained tokenizers and tokenized corpora; null is $TOKENYARD_CACHE or ~/.cache/tokenyard."""
    synthetic_documents: int = 512
    """Documents of the synthetic corpus."""


class TokenizerKind(Enum):
    sentencepiece = "sentencepiece"
    bytes = "bytes"


@dataclass
class TokenizerConfig:
    kind: TokenizerKind = TokenizerKind.sentencepiece
    """sentencepiece: BPE with byte fallback, trained on the training documents at first use; bytes: 256 bytes and 3 marks."""
    path: str | None = None
    """An existing sentencepiece .model file; null trains one."""
    pieces: int = 8192
    """Vocabulary of a tokenizer that is trained here."""
    sample_bytes: int = 6_000_000
    """How much of the training documents it is trained on."""
