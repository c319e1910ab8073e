"""Opens the sources of a run: the mixture to train on, the validation documents, and samples for a tokenizer."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from ..cache import atomic_folder
from ..config import Corpus, DataConfig, MixtureSource
from ..corpus import survey
from ..errors import BadData
from ..pretokenized import open_pretokenized
from ..token_array import MANIFEST_FILE, TOKENS_FILE, TokenArray, TokensManifest, load_tokens, open_tokens, write_stamp
from ..tokenizer_types import Tokenizer
from .documents import TokenizingRanks
from .mixture import Mixture
from .packing import ArrayRows, ReadFailure, RowSource, StreamRows, StreamSettings, too_many_bad_rows
from .shards import BadRow, FailedShard, Row, Shards
from .tokenize import Tokenization, is_held_out, parse_row

SAMPLED_SHARDS = 16


class OpenedSource(NamedTuple):
    """A streamed source and its shards."""

    part: MixtureSource
    shards: Shards


class OpenedTokens(NamedTuple):
    """A source that is not streamed, and its tokens to train on."""

    part: MixtureSource
    tokens: TokenArray


def build_mixture(
    parts: list[OpenedSource | OpenedTokens],
    tokenizer: Tokenizer,
    seed: int,
    length: int,
    ranks: TokenizingRanks,
    pool: ThreadPoolExecutor | None,
) -> Mixture:
    """Returns the mixture of all sources. Raises ValueError, one line, for a source without a row."""
    sources = [_source(opened, tokenizer, seed, length, ranks, pool) for opened in parts]
    return Mixture(sources, [opened.part.weight for opened in parts], ranks)


def open_array(config: DataConfig, split: str, tokenizer: Tokenizer, cache: Path) -> TokenArray:
    """Returns the tokens of a source that is not streamed: a corpus, tokenized if the cache lacks it, or pretokenized shards."""
    if config.corpus is Corpus.prepared:
        return open_pretokenized(config, tokenizer.hash, split)
    return open_tokens(survey(config), "train" if split == "train" else "validation", tokenizer, cache, config.verify)


def held_out_tokens(
    opened: OpenedSource,
    tokenizer: Tokenizer,
    cache: Path,
    wanted: int,
    report: Callable[[list[ReadFailure]], None] = lambda _: None,
) -> TokenArray:
    """Returns validation documents of a streamed source, until they have `wanted` tokens or the source ends.

    `report` is called with what could not be read. If there is no document: BadData if read failures may be why, else ValueError.
    """
    config = opened.part.config
    parts = ("held out 1", opened.shards.fingerprint, tokenizer.hash, config.validation_fraction, config.longest_row, wanted)
    folder = cache / "tokens" / xxhash.xxh3_128_hexdigest(repr(parts).encode())
    if not folder.is_dir():
        with atomic_folder(folder) as unfinished:
            report(_write_held_out(opened, tokenizer, wanted, unfinished))
    return load_tokens(folder, config.verify)


def sample_texts(opened: OpenedSource, limit: int) -> list[str]:
    """Beginnings of training documents of up to 16 shards, together about `limit` bytes; deterministic."""
    shards, tokenization, texts, found = opened.shards, _tokenization(opened.part.config, None), [], _SourceScan(opened)
    chosen = range(0, len(shards.names), max(1, len(shards.names) // SAMPLED_SHARDS))
    for shard in chosen:
        left = limit // len(chosen)
        for _, text in found.rows(shard, tokenization):
            if isinstance(text, str):
                texts.append(text[: max(16384, left // 16)])
                left -= len(texts[-1].encode())
            if left <= 0:
                break
    if not texts:
        found.raise_if_cause()
    return texts


def concatenate_tokens(parts: list[TokenArray], weights: list[float], wanted: int) -> TokenArray:
    """Returns about `wanted` tokens: the first of each part, in proportion to the weights."""
    shares = token_shares(parts, weights, wanted)
    ids = np.concatenate([part.ids[:share] for part, share in zip(parts, shares, strict=True)])
    running = xxhash.xxh3_128(b"".join(part.manifest.fingerprint.encode() for part in parts))
    documents, size = sum(part.manifest.documents for part in parts), sum(part.manifest.bytes for part in parts)
    return TokenArray(ids, TokensManifest(documents, len(ids), size, [], 0, 0, running.hexdigest()))


def token_shares(parts: list[TokenArray], weights: list[float], wanted: int) -> list[int]:
    """Returns the number of tokens that `concatenate_tokens` takes of each part."""
    total = sum(weights)
    shares = [min(len(part.ids), max(2, round(wanted * weight / total))) for part, weight in zip(parts, weights, strict=True)]
    for index in reversed(range(len(parts))):  # make up for rounding, from parts that have more tokens
        shares[index] += min(len(parts[index].ids) - shares[index], max(0, wanted - sum(shares)))
    return shares


def _source(
    opened: OpenedSource | OpenedTokens,
    tokenizer: Tokenizer,
    seed: int,
    length: int,
    ranks: TokenizingRanks,
    pool: ThreadPoolExecutor | None,
) -> RowSource:
    label, config = opened.part.label, opened.part.config
    if isinstance(opened, OpenedSource):
        order, limits = (config.window, config.open_shards), (config.max_bad_fraction, config.max_failed_files)
        settings = StreamSettings(seed, length, *order, config.ahead, config.repeat, *limits)
        return StreamRows(label, opened.shards, _tokenization(config, tokenizer), settings, ranks, pool)
    if (tokens := len(opened.tokens.ids)) <= length:
        raise ValueError(f"sequence_length={length} is more than source {label} has; the largest possible value is {tokens - 1}")
    return ArrayRows(label, opened.tokens, seed, length, config.repeat, ranks)


def _tokenization(config: DataConfig, tokenizer: Tokenizer | None) -> Tokenization:
    return Tokenization(tokenizer, config.validation_fraction, config.longest_row)  # pyright: ignore[reportArgumentType]


def _write_held_out(opened: OpenedSource, tokenizer: Tokenizer, wanted: int, folder: Path) -> list[ReadFailure]:
    """Writes validation documents to `folder`. Returns what could not be read."""
    found, parts, documents, size, tokens = _SourceScan(opened), [], 0, 0, 0
    for text in _held_out_texts(found, tokenizer):
        parts.append(np.array(tokenizer.encode_documents([text], threads=1)[0], dtype=np.uint32))
        documents, size, tokens = documents + 1, size + len(text.encode()), tokens + len(parts[-1])
        if tokens >= wanted:
            break
    if not parts:
        found.raise_if_cause()
        where = f"data.validation_fraction={opened.part.config.validation_fraction}"
        raise ValueError(f"{where} keeps no document of source {opened.part.label} for validation; raise it")
    ids = np.concatenate(parts)
    np.save(folder / TOKENS_FILE, ids, allow_pickle=False)
    manifest = TokensManifest(documents, len(ids), size, [], 0, 0, xxhash.xxh3_128_hexdigest(ids.tobytes()))
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest._asdict()) + "\n")
    write_stamp(folder)
    return [*found.failed, *found.bad]


def _held_out_texts(found: "_SourceScan", tokenizer: Tokenizer) -> Iterator[str]:
    config = found.opened.part.config
    for shard in range(len(found.opened.shards.names)):
        for row, text in found.rows(shard, _tokenization(config, tokenizer)._replace(held_out=0.0)):
            if isinstance(row, bytes) and is_held_out(row, config.validation_fraction):
                yield text


class _SourceScan:
    """Reads a source before the run begins, and collects what cannot be read."""

    def __init__(self, opened: OpenedSource) -> None:
        self.opened, self.count = opened, 0
        self.failed: list[ReadFailure] = []
        self.bad: list[ReadFailure] = []

    def rows(self, shard: int, tokenization: Tokenization) -> Iterator[tuple[Row, Any]]:
        """Yields the rows of a shard that are not bad, each with the result of `parse_row`."""
        label, name = self.opened.part.label, self.opened.shards.names[shard]
        for number, row in enumerate(self.opened.shards.rows(shard, 0)):
            if isinstance(row, FailedShard):
                self.failed.append(ReadFailure("file_failed", label, name, number, row.reason, len(self.failed) + 1))
                return
            self.count += 1
            item = row if isinstance(row, np.ndarray) and tokenization.tokenizer is None else parse_row(row, tokenization)
            if isinstance(item, BadRow):
                self.bad.append(ReadFailure("bad_row", label, name, number, item.reason, len(self.bad) + 1))
            else:
                yield row, item

    def raise_if_cause(self) -> None:
        """Raises BadData if a file failed or there were too many bad rows, which may be why no document was found."""
        if self.failed:
            raise BadData(f"{self.failed[0]}; no document of source {self.opened.part.label} could be read before")
        bad = [(each.file, each.row, each.reason) for each in self.bad]
        if text := too_many_bad_rows(self.opened.part.label, len(bad), self.count, bad, self.opened.part.config.max_bad_fraction):
            raise BadData(text)
