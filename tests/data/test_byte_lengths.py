"""The bytes of the ids of a text add up to the bytes of the text, so that bits per byte compare tokenizers."""

import unicodedata
from pathlib import Path

import pytest
from tokenizer_cases import CASES, mixed_texts, saved_tokenizer
from tokenyard.data.config import Corpus, DataConfig, TokenizerConfig, TokenizerKind
from tokenyard.data.corpus import survey
from tokenyard.data.tokenizer import build_tokenizer, ready_tokenizer
from tokenyard.data.tokenizer_types import BytesTokenizer, SentencePieceTokenizer, Tokenizer

TEXTS = mixed_texts(40_000)


def huggingface(name: str, folder: Path) -> Tokenizer:
    saved = saved_tokenizer(name, folder)
    tokenizer = ready_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(saved)))
    assert tokenizer is not None
    return tokenizer


def total(tokenizer: Tokenizer, text: str) -> int:
    lengths = tokenizer.byte_lengths()
    assert len(lengths) == tokenizer.size
    assert lengths[tokenizer.end_of_document] == 0
    return int(lengths[tokenizer.encode_documents([text], threads=1)[0]].sum())


def test_bytes() -> None:
    assert [total(BytesTokenizer(), text) for text in TEXTS[:30]] == [len(text.encode()) for text in TEXTS[:30]]


def test_a_tokenizer_trained_here(tmp_path: Path) -> None:
    corpus = survey(DataConfig(corpus=Corpus.synthetic, synthetic_documents=200))
    tokenizer = build_tokenizer(TokenizerConfig(pieces=400), corpus, tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.verbatim
    assert [total(tokenizer, text) for text in TEXTS] == [len(text.encode()) for text in TEXTS]


@pytest.mark.parametrize("name", CASES)
def test_a_tokenizer_of_others(name: str, tmp_path: Path) -> None:
    """Of what the tokenizer makes of a text: composed characters for Qwen's, a space before the text for Mixtral's."""
    tokenizer = huggingface(name, tmp_path)
    lengths = tokenizer.byte_lengths()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        match name:
            case "qwen":
                expected = len(unicodedata.normalize("NFC", text).encode())
            case "mixtral":
                expected = len(text.replace("\u2581", " ").encode()) + bool(text)
            case "unigram":
                expected = len((" " + tokenizer.decode(ids)).encode()) if ids else 0
            case _:
                expected = len(text.encode())
        assert lengths[ids].sum() == expected, repr(text[:60])
