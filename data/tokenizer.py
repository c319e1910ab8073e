"""Opens tokenizers: what the configuration names, one trained on the training documents, one that was saved."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import sentencepiece
import xxhash

from .cache import atomic_folder
from .config import TokenizerConfig, TokenizerKind
from .corpus import CorpusSurvey
from .huggingface_tokenizer import HuggingFaceTokenizer, read_companions
from .tokenizer_path import MODEL_FILE, TOKENIZER_JSON, check_tokenizer, tokenizer_file
from .tokenizer_training import RECIPE, sample, train_pieces
from .tokenizer_types import ABOUT_FILE, BytesTokenizer, SentencePieceTokenizer, Tokenizer

log = logging.getLogger("tokenyard")


def build_tokenizer(config: TokenizerConfig, corpus: CorpusSurvey, cache: Path) -> Tokenizer:
    """Returns the tokenizer of `config`: bytes, an existing model, or one trained on the training documents, from `cache`.

    Raises ValueError, one line, for settings that cannot work, in general or with this corpus.
    """
    return ready_tokenizer(config) or trained_tokenizer(config, sample(corpus, config.sample_bytes), cache)


def ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """Returns the tokenizer that `config` describes; None if it must be trained."""
    check_tokenizer(config)
    if config.kind is TokenizerKind.bytes:
        return BytesTokenizer()
    if config.path is None:
        return None
    file, origin = tokenizer_file(config), f"tokenizer.path={config.path}"
    content = file.read_bytes()
    if config.kind is TokenizerKind.sentencepiece:
        return SentencePieceTokenizer(content, origin)
    tokenizer = HuggingFaceTokenizer(content, origin, config.end, config.begin, read_companions(file.parent))
    if tokenizer.dropout:
        rule = "draws other ids for equal texts, so that two runs of one seed differ; the nearest value is null"
        raise ValueError(f"{origin} must be a tokenizer without dropout: its model.dropout={tokenizer.dropout:.6g} {rule}")
    return tokenizer


def trained_tokenizer(config: TokenizerConfig, texts: list[str], cache: Path) -> Tokenizer:
    """Returns a sentencepiece model trained on `texts`, from `cache` if it is there."""
    folder = cache / "tokenizers" / _key(config, texts)
    if not folder.is_dir():
        _train(texts, config.pieces, folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote into `folder`.

    Raises ValueError, one line, if its files are missing or were changed.
    """
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT_FILE).read_text())
        tokenizer = _saved(folder, about)
        same = tokenizer.hash == about["hash"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"tokenizer folder {folder} must hold {MODEL_FILE} and {ABOUT_FILE} as they were saved ({error})"
        ) from None
    if not same:
        raise ValueError(f"tokenizer folder {folder} must hold what was saved: hash {tokenizer.hash} is not {about['hash']}")
    return tokenizer


def settings_of_saved(folder: Path) -> dict[str, str | None]:
    """Returns the settings of a TokenizerConfig that opens what `save` wrote into `folder`. Raises like `load_tokenizer`."""
    load_tokenizer(folder)
    about = json.loads((folder / ABOUT_FILE).read_text())
    begin = about.get("begin", "") if about["kind"] == TokenizerKind.huggingface.value else None
    file = {TokenizerKind.bytes.value: None, TokenizerKind.huggingface.value: TOKENIZER_JSON}.get(about["kind"], MODEL_FILE)
    return {"kind": about["kind"], "path": file and str(folder / file), "end": about.get("end"), "begin": begin}


def _saved(folder: Path, about: dict[str, Any]) -> Tokenizer:
    match about["kind"]:
        case TokenizerKind.bytes.value:
            return BytesTokenizer()
        case TokenizerKind.huggingface.value:
            content, companions = (folder / TOKENIZER_JSON).read_bytes(), read_companions(folder)
            # Those saved before there was a begin of documents had none.
            return HuggingFaceTokenizer(content, str(folder), about["end"], about.get("begin", ""), companions)
        case _:
            return SentencePieceTokenizer((folder / MODEL_FILE).read_bytes(), str(folder))


def _key(config: TokenizerConfig, texts: list[str]) -> str:
    key = xxhash.xxh3_128(f"{RECIPE} {sentencepiece.__version__} {config.pieces}".encode())
    for text in texts:
        key.update(b"%d\0" % len(text) + text.encode())
    return key.hexdigest()


def _train(texts: list[str], pieces: int, folder: Path) -> None:
    started = time.perf_counter()
    tokenizer = SentencePieceTokenizer(train_pieces(texts, pieces), "the trained model")
    with atomic_folder(folder) as unfinished:
        tokenizer.save(unfinished)
    size = sum(map(len, texts)) / 1e6
    log.info("data: trained %d pieces on %.1f MB in %.1f s", tokenizer.size, size, time.perf_counter() - started)
