"""Facts about a sample of the documents of a run: lengths, bytes a token, scripts, duplicates."""

import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import xxhash

from .build import retry_policy
from .config import STREAMED, Corpus, DataConfig, MixtureSource, mixture_sources
from .corpus import documents
from .pretokenized import open_pretokenized
from .stream.hub_shards import open_shards
from .tokenizer_types import Tokenizer

SAMPLED_FILES = 16
"""Of a source, spread over all."""


@dataclass
class DocumentStats:
    """Sums over a sample of documents."""

    tokens: list[int] = field(default_factory=list)
    """Of each document."""
    bytes: list[int] = field(default_factory=list)
    """UTF-8 bytes of each document."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Characters by script."""
    exact: int = 0
    """Documents with exactly the text of an earlier one."""
    near: int = 0
    """Documents that equal an earlier one but for case and white space; `exact` is part of them."""
    most_repeated: tuple[int, str] = (1, "")
    """How often the most frequent text is there, and its beginning."""


def document_stats(config: DataConfig, tokenizer: Tokenizer, most: int) -> DocumentStats:
    """Returns facts about up to `most` documents of each source. Bad rows are left out, as in training."""
    found, seen, alike = DocumentStats(), Counter[str](), set[str]()
    for part in mixture_sources(config):
        for text, tokens in islice(_documents(part, tokenizer), most):
            found.tokens.append(tokens)
            found.bytes.append(len(text.encode(errors="replace")))
            for character, count in Counter(text).items():
                found.scripts[script(character)] += count
            digest, plain = (xxhash.xxh3_128_hexdigest(each.encode(errors="replace")) for each in (text, _plain(text)))
            seen[digest] += 1
            found.exact += seen[digest] > 1
            found.near += plain in alike
            alike.add(plain)
            if seen[digest] > found.most_repeated[0]:
                found.most_repeated = seen[digest], text[:60]
    return found


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _documents(part: MixtureSource, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """Yields documents of a source, each with the number of its tokens."""
    config = part.config
    if config.corpus is Corpus.prepared:
        yield from _prepared(config, tokenizer)
    elif config.corpus in STREAMED:
        shards = open_shards(config, retry_policy(config))
        for shard in range(0, len(shards.names), max(1, -(-len(shards.names) // SAMPLED_FILES))):
            for row in shards.rows(shard, 0):
                if isinstance(row, bytes) and row.strip() and len(row) <= config.longest_row:
                    yield _encoded(row.decode(errors="replace"), tokenizer)
                elif isinstance(row, np.ndarray) and ((row >= 0) & (row < tokenizer.size)).all():
                    yield tokenizer.decode(row.tolist()), len(row) + 1
    else:
        for document in documents(config, "train"):
            yield _encoded(document.text, tokenizer)


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[str, int]:
    return text, len(tokenizer.encode_documents([text], threads=1)[0])


def _prepared(config: DataConfig, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    array = open_pretokenized(config, tokenizer.hash, "train")
    block, held = 1 << 16, np.empty(0, dtype=np.int64)
    for begin in range(0, len(array.ids), block):
        held = np.concatenate([held, np.asarray(array.ids[begin : begin + block], dtype=np.int64)])
        ends = np.flatnonzero(held == tokenizer.end_of_document) + 1
        for start, end in zip([0, *ends[:-1]], ends, strict=False):
            yield tokenizer.decode(held[start : end - 1].tolist()), int(end - start)
        held = held[ends[-1] :] if len(ends) else held


def script(character: str) -> str:
    """Returns the script of a letter, by the first word of its name in Unicode; of others the kind: digits, spaces, marks."""
    kind = unicodedata.category(character)[0]
    if kind in "LM":
        return unicodedata.name(character, "unnamed").split()[0].split("-")[0].lower()
    return {"N": "digits", "Z": "spaces", "C": "controls and line ends"}.get(kind, "punctuation and symbols")
