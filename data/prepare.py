"""Everything between the settings and the first batch."""

import logging
from typing import NamedTuple

from .batches import GlobalBatches, ValidationBatches, unigram_entropy
from .cache import cache_folder
from .config import DataConfig, TokenizerConfig
from .corpus import Corpus, survey
from .tokenizer import Tokenizer, build_tokenizer
from .tokens import Tokens, open_tokens

log = logging.getLogger("tokenyard")


class Facts(NamedTuple):
    """What the start-up table and the report say about the data; ranks that train together have equal facts."""

    train_documents: int
    train_tokens: int
    validation_documents: int
    validation_tokens: int
    bytes_per_token: float
    """Of the training documents."""
    undecodable: int
    duplicates: int
    empty: int
    unigram_entropy: float
    """Of the validation tokens, nats per token."""
    train_fingerprint: str
    validation_fingerprint: str
    tokenizer_hash: str


class Prepared(NamedTuple):
    tokenizer: Tokenizer
    train: GlobalBatches
    validation: ValidationBatches
    facts: Facts


def prepare(
    config: DataConfig, tokenizer_config: TokenizerConfig, sequence_length: int, seed: int, batch_sequences: int
) -> Prepared:
    """Open the corpus, training a tokenizer and tokenizing where the cache has neither.

    Any number of processes may call this at once; to save work let rank 0 be first, the others then find all in the cache.
    Raises a ValueError of one line for settings that cannot work.
    """
    cache = cache_folder(config)
    corpus = survey(config)
    tokenizer = build_tokenizer(tokenizer_config, corpus, cache)
    train = open_tokens(corpus, "train", tokenizer, cache)
    validation = open_tokens(corpus, "validation", tokenizer, cache)
    batches = GlobalBatches(train, seed=seed, sequences=batch_sequences, sequence_length=sequence_length)
    facts = _facts(corpus, train, validation, tokenizer)
    log.info(
        "data: %d tokens to train on, %.2f bytes each; %d to validate",
        facts.train_tokens,
        facts.bytes_per_token,
        facts.validation_tokens,
    )
    return Prepared(tokenizer, batches, ValidationBatches(validation, sequence_length=sequence_length), facts)


def _facts(corpus: Corpus, train: Tokens, validation: Tokens, tokenizer: Tokenizer) -> Facts:
    return Facts(
        train_documents=train.manifest.documents,
        train_tokens=train.manifest.tokens,
        validation_documents=validation.manifest.documents,
        validation_tokens=validation.manifest.tokens,
        bytes_per_token=train.manifest.bytes / train.manifest.tokens,
        undecodable=len(corpus.undecodable),
        duplicates=corpus.duplicates,
        empty=corpus.empty,
        unigram_entropy=unigram_entropy(validation.ids, tokenizer.size),
        train_fingerprint=train.manifest.fingerprint,
        validation_fingerprint=validation.manifest.fingerprint,
        tokenizer_hash=tokenizer.hash,
    )
