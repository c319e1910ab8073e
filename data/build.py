"""Builds the data pipeline of a run: tokenizer, training batches and validation batches."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from .batch_sizes import BatchSizes
from .batches import GlobalBatches, ValidationBatches, unigram_entropy
from .cache import cache_folder
from .checks import check_corpus
from .config import STREAMED, Corpus, DataConfig, MixtureSource, Packing, TokenizerConfig, mixture_sources
from .corpus import CorpusSurvey, survey
from .pretokenized import open_place, open_pretokenized, tokenizer_overrides
from .stream.documents import TokenizingRanks
from .stream.files import is_remote
from .stream.http import RetryPolicy
from .stream.hub_shards import open_shards
from .stream.mixture import Mixture, StreamBatches
from .stream.shards import ShardFiles
from .stream.source import (
    OpenedSource,
    OpenedTokens,
    build_mixture,
    concatenate_tokens,
    held_out_tokens,
    open_array,
    sample_texts,
    token_shares,
)
from .token_array import TokenArray, TokensPlace, open_tokens
from .tokenizer import Tokenizer, build_tokenizer, ready_tokenizer, trained_tokenizer
from .tokenizer_training import sample

log = logging.getLogger("tokenyard")


class Facts(NamedTuple):
    """Numbers about the data for the start-up table and the report; equal on all ranks."""

    train_documents: int | None
    """None if the documents are streamed: their number is not known."""
    train_tokens: int | None
    validation_documents: int
    validation_tokens: int
    bytes_per_token: float
    """In the training documents, or in the validation documents if the former are streamed."""
    undecodable: int
    duplicates: int
    empty: int
    unigram_entropy: float
    """Nats per token of the validation tokens."""
    train_fingerprint: str
    tokenizer_hash: str


class OpenedData(NamedTuple):
    """What rank 0 tells the others about the data, so that they read no manifest, no list of files and no document of others."""

    tokenizer: Tokenizer
    train: list[TokensPlace | ShardFiles | None]
    """Of each source; None if it has to be opened again."""
    validation: TokensPlace | TokenArray
    """Of several sources the tokens themselves."""
    shares: list[int]
    """The validation tokens of each source."""
    facts: Facts

    @property
    def here(self) -> bool:
        """Whether this process sees the files."""
        places = [each for each in (*self.train, self.validation) if isinstance(each, TokensPlace)]
        local = [files.paths[0] for files in self.train if isinstance(files, ShardFiles) and not is_remote(files.paths[0])]
        return all(Path(path).exists() for path in (*local, *(place.path for place in places)))


class DataPipeline(NamedTuple):
    """The data of a run, opened."""

    tokenizer: Tokenizer
    train: GlobalBatches | StreamBatches
    validation: ValidationBatches
    facts: Facts
    opened: OpenedData
    """For other processes."""


def open_data(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    sequence_length: int,
    seed: int,
    batch_sequences: int | BatchSizes,
    ranks: TokenizingRanks | None = None,
    validation_sequences: int = 256,
    known: OpenedData | None = None,
) -> DataPipeline:
    """Opens the corpus. Trains a tokenizer and tokenizes where the cache lacks the result.

    Any number of processes may call this at once. Call it on rank 0 first to save work: the others find everything in the cache.
    `ranks` share the tokenizing of streamed data. `known`: what another process has found in files that this one may see too.
    Raises ValueError, one line, for settings that cannot work.
    """
    known = known if known is not None and known.here else None
    if known is None:
        check_corpus(config)
    cache = cache_folder(config)
    settings = BatchSettings(sequence_length, seed, batch_sequences, ranks or TokenizingRanks(), validation_sequences)
    open_kind = _open_stream if config.corpus in (*STREAMED, Corpus.mix) else _open_corpus
    opened = open_kind(config, tokenizer_config, cache, settings, known)
    facts = opened.facts
    text = f"{facts.train_tokens} tokens" if facts.train_tokens is not None else "a stream of tokens"
    log.info("data: %s to train on, %.2f bytes each; %d to validate", text, facts.bytes_per_token, facts.validation_tokens)
    return opened


class BatchSettings(NamedTuple):
    """What the batches depend on in addition to the data, and the ranks that make them."""

    length: int
    seed: int
    sequences: int | BatchSizes
    ranks: TokenizingRanks
    validation: int
    """Validation sequences."""


def open_tokenizer(config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path) -> Tokenizer:
    """Returns the tokenizer of a run; trained on samples of its sources unless the configuration names one."""
    tokenizer = ready_tokenizer(tokenizer_config)
    if tokenizer is not None:
        return tokenizer
    if config.corpus is Corpus.prepared:
        raise ValueError(f"tokenizer.path=null cannot be trained on tokens; take {tokenizer_overrides(Path(config.path or ''))}")
    parts, limit = mixture_sources(config), tokenizer_config.sample_bytes
    total = sum(part.weight for part in parts)
    texts: list[str] = []
    for part in parts:
        share = max(1, round(limit * part.weight / total))
        if part.config.corpus in STREAMED:
            texts += sample_texts(OpenedSource(part, open_shards(part.config, retry_policy(part.config))), share)
        elif part.config.corpus is not Corpus.prepared:
            texts += sample(survey(part.config), share)
    return trained_tokenizer(tokenizer_config, texts, cache)


def retry_policy(config: DataConfig) -> RetryPolicy:
    """Returns the RetryPolicy of the settings, with a `closed` event of its own."""
    return RetryPolicy(config.patience_seconds, config.stall_seconds, threading.Event())


def _open_corpus(
    config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path, settings: BatchSettings, known: OpenedData | None
) -> DataPipeline:
    corpus = None
    if known is not None:
        places = known.train[0], known.validation
        train, validation = (open_place(place, config.verify) for place in places if isinstance(place, TokensPlace))
        tokenizer = known.tokenizer
    elif config.corpus is Corpus.prepared:
        tokenizer = open_tokenizer(config, tokenizer_config, cache)
        train, validation = (open_pretokenized(config, tokenizer.hash, split) for split in ("train", "validation"))
    else:
        corpus = survey(config)
        tokenizer = build_tokenizer(tokenizer_config, corpus, cache)
        train, validation = (open_tokens(corpus, split, tokenizer, cache, config.verify) for split in ("train", "validation"))
    batches = _batches(config, tokenizer, train, settings, cache)
    if known is None:
        facts = _facts(corpus, train, validation, tokenizer)._replace(train_fingerprint=batches.fingerprint)
        known = OpenedData(tokenizer, [train.place], validation.place or validation, [], facts)
    if batches.fingerprint != known.facts.train_fingerprint:
        raise ValueError(
            f"data.cache={cache}: its packed rows are of another version than those of rank 0; remove {cache / 'packed'}"
        )
    rows = ValidationBatches(validation, sequence_length=settings.length)
    return DataPipeline(tokenizer, batches, rows, known.facts, known)


def _batches(config: DataConfig, tokenizer: Tokenizer, train: TokenArray, settings: BatchSettings, cache: Path) -> GlobalBatches:
    end = tokenizer.end_of_document if config.packing is Packing.best_fit else None
    return GlobalBatches(
        train,
        seed=settings.seed,
        sequences=settings.sequences,
        sequence_length=settings.length,
        packed_by=end,
        cache=cache,
    )


def _open_stream(
    config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path, settings: BatchSettings, known: OpenedData | None
) -> DataPipeline:
    tokenizer = known.tokenizer if known else open_tokenizer(config, tokenizer_config, cache)
    retry, parts = retry_policy(config), mixture_sources(config)
    found = known.train if known else [None] * len(parts)
    opened = [_open_source(part, each, tokenizer, cache, retry) for part, each in zip(parts, found, strict=True)]
    pool = ThreadPoolExecutor(config.workers, "tokenyard-data") if config.workers else None
    mixture = build_mixture(opened, tokenizer, settings.seed, settings.length, settings.ranks, pool)
    batches = StreamBatches(mixture, sequences=settings.sequences, retry=retry, pool=pool)
    if known is None:
        validation, shares = _validation_of(opened, mixture, tokenizer, cache, settings.validation * settings.length + 1)
        facts = _facts(None, validation, validation, tokenizer)
        facts = facts._replace(train_documents=None, train_tokens=None, train_fingerprint=batches.fingerprint)
        places = [each.shards.files if isinstance(each, OpenedSource) else each.tokens.place for each in opened]
        known = OpenedData(tokenizer, places, validation, shares, facts)
    assert isinstance(known.validation, TokenArray)
    sources = list(zip((source.label for source in mixture.sources), known.shares, strict=True))
    rows = ValidationBatches(known.validation, sequence_length=settings.length, sources=sources)
    return DataPipeline(tokenizer, batches, rows, known.facts, known)


def _open_source(
    part: MixtureSource, found: TokensPlace | ShardFiles | None, tokenizer: Tokenizer, cache: Path, retry: RetryPolicy
) -> OpenedSource | OpenedTokens:
    """Opens a source, or what another process has `found` of it."""
    if part.config.corpus in STREAMED:
        return OpenedSource(part, open_shards(part.config, retry, found if isinstance(found, ShardFiles) else None))
    if isinstance(found, TokensPlace):
        return OpenedTokens(part, open_place(found, part.config.verify))
    return OpenedTokens(part, open_array(part.config, "train", tokenizer, cache))


def _validation_of(
    opened: list[OpenedSource | OpenedTokens], mixture: Mixture, tokenizer: Tokenizer, cache: Path, wanted: int
) -> tuple[TokenArray, list[int]]:
    """Returns about `wanted` validation tokens of all sources, and how many are of each."""
    held_out = [
        held_out_tokens(part, tokenizer, cache, wanted, source.add_failures)
        if isinstance(part, OpenedSource)
        else open_array(part.part.config, "validation", tokenizer, cache)
        for part, source in zip(opened, mixture.sources, strict=True)
    ]
    return concatenate_tokens(held_out, mixture.weights, wanted), token_shares(held_out, mixture.weights, wanted)


def _facts(corpus: CorpusSurvey | None, train: TokenArray, validation: TokenArray, tokenizer: Tokenizer) -> Facts:
    return Facts(
        train_documents=train.manifest.documents,
        train_tokens=train.manifest.tokens,
        validation_documents=validation.manifest.documents,
        validation_tokens=validation.manifest.tokens,
        bytes_per_token=train.manifest.bytes / train.manifest.tokens,
        undecodable=len({*train.manifest.undecodable, *validation.manifest.undecodable}),
        duplicates=corpus.duplicates if corpus else 0,
        empty=corpus.empty if corpus else 0,
        unigram_entropy=unigram_entropy(validation.ids, tokenizer.size),
        train_fingerprint=train.manifest.fingerprint,
        tokenizer_hash=tokenizer.hash,
    )
