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
from .config import STREAMED, Corpus, DataConfig, Packing, TokenizerConfig, mixture_sources
from .corpus import CorpusSurvey, survey
from .pretokenized import open_pretokenized, tokenizer_overrides
from .stream.documents import TokenizingRanks
from .stream.http import RetryPolicy
from .stream.mixture import StreamBatches
from .stream.shards import open_shards
from .stream.source import OpenedSource, build_mixture, concatenate_tokens, held_out_tokens, open_array, sample_texts, token_shares
from .token_array import TokenArray, TokensManifest, map_tokens, open_tokens
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


class CachedCorpus(NamedTuple):
    """What rank 0 tells the others about a corpus in the cache, so that they read nothing of it but its tokens."""

    tokenizer: Tokenizer
    splits: list[tuple[str, TokensManifest]]
    """The files of tokens and their manifests: training, validation."""
    facts: Facts


class DataPipeline(NamedTuple):
    """The data of a run, opened."""

    tokenizer: Tokenizer
    train: GlobalBatches | StreamBatches
    validation: ValidationBatches
    facts: Facts
    cached: CachedCorpus | None = None
    """None for data that are streamed or prepared."""


def open_data(
    config: DataConfig,
    tokenizer_config: TokenizerConfig,
    sequence_length: int,
    seed: int,
    batch_sequences: int | BatchSizes,
    ranks: TokenizingRanks | None = None,
    validation_sequences: int = 256,
    cached: CachedCorpus | None = None,
) -> DataPipeline:
    """Opens the corpus. Trains a tokenizer and tokenizes where the cache lacks the result.

    Any number of processes may call this at once. Call it on rank 0 first to save work: the others find everything in the cache.
    `ranks` share the tokenizing of streamed data. `cached`: what another process has found in a cache that this one may see too.
    Raises ValueError, one line, for settings that cannot work.
    """
    check_corpus(config)
    cache = cache_folder(config)
    settings = BatchSettings(sequence_length, seed, batch_sequences, ranks or TokenizingRanks(), validation_sequences)
    if cached is not None and all(Path(path).is_file() for path, _ in cached.splits):
        opened = _open_cached(config, cached, settings, cache)
    elif config.corpus in (*STREAMED, Corpus.mix):
        opened = _open_stream(config, tokenizer_config, cache, settings)
    else:
        opened = _open_corpus(config, tokenizer_config, cache, settings)
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


def _open_corpus(config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path, settings: BatchSettings) -> DataPipeline:
    if config.corpus is Corpus.prepared:
        tokenizer = open_tokenizer(config, tokenizer_config, cache)
        corpus, train, validation = (
            None,
            *(open_pretokenized(config, tokenizer.hash, split, settings.ranks.rank == 0) for split in ("train", "validation")),
        )
    else:
        corpus = survey(config)
        tokenizer = build_tokenizer(tokenizer_config, corpus, cache)
        train, validation = (open_tokens(corpus, split, tokenizer, cache, config.verify) for split in ("train", "validation"))
    batches = _batches(config, tokenizer, train, settings, cache)
    facts = _facts(corpus, train, validation, tokenizer)._replace(train_fingerprint=batches.fingerprint)
    arrays = [(array.ids, array.manifest) for array in (train, validation)]
    cached = None
    if corpus is not None:
        cached = CachedCorpus(tokenizer, [(str(getattr(ids, "filename", "")), manifest) for ids, manifest in arrays], facts)
    return DataPipeline(tokenizer, batches, ValidationBatches(validation, sequence_length=settings.length), facts, cached)


def _open_cached(config: DataConfig, cached: CachedCorpus, settings: BatchSettings, cache: Path) -> DataPipeline:
    train, validation = (map_tokens(Path(path), manifest) for path, manifest in cached.splits)
    batches = _batches(config, cached.tokenizer, train, settings, cache)
    validation = ValidationBatches(validation, sequence_length=settings.length)
    return DataPipeline(cached.tokenizer, batches, validation, cached.facts, cached)


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


def _open_stream(config: DataConfig, tokenizer_config: TokenizerConfig, cache: Path, settings: BatchSettings) -> DataPipeline:
    tokenizer = open_tokenizer(config, tokenizer_config, cache)
    retry = retry_policy(config)
    parts = [
        OpenedSource(part, open_shards(part.config, retry)) if part.config.corpus in STREAMED else part
        for part in mixture_sources(config)
    ]
    pool = ThreadPoolExecutor(config.workers, "tokenyard-data") if config.workers else None
    mixture = build_mixture(parts, tokenizer, cache, settings.seed, settings.length, settings.ranks, pool)
    batches = StreamBatches(mixture, sequences=settings.sequences, retry=retry, pool=pool)
    wanted = settings.validation * settings.length + 1
    held_out = [
        held_out_tokens(part, tokenizer, cache, wanted, source.add_failures)
        if isinstance(part, OpenedSource)
        else open_array(part.config, "validation", tokenizer, cache, settings.ranks.rank == 0)
        for part, source in zip(parts, mixture.sources, strict=True)
    ]
    validation = concatenate_tokens(held_out, mixture.weights, wanted)
    facts = _facts(None, validation, validation, tokenizer)
    facts = facts._replace(train_documents=None, train_tokens=None, train_fingerprint=batches.fingerprint)
    shares = zip(mixture.sources, token_shares(held_out, mixture.weights, wanted), strict=True)
    sources = [(source.label, share) for source, share in shares]
    return DataPipeline(tokenizer, batches, ValidationBatches(validation, sequence_length=settings.length, sources=sources), facts)


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
