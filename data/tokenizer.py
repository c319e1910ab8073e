"""Text to token ids and back, exactly."""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import sentencepiece
import xxhash

from .cache import atomic_folder
from .checks import check_tokenizer
from .config import TokenizerConfig, TokenizerKind
from .corpus import CorpusSurvey
from .tokenizer_training import RECIPE, sample, train_pieces

MODEL_FILE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
ABOUT_FILE = "tokenizer_about.json"
log = logging.getLogger("tokenyard")


def build_tokenizer(config: TokenizerConfig, corpus: CorpusSurvey, cache: Path) -> "Tokenizer":
    """Returns the tokenizer of `config`: bytes, an existing model, or one trained on the training documents, from `cache`.

    Raises ValueError, one line, for settings that cannot work, in general or with this corpus.
    """
    return ready_tokenizer(config) or trained_tokenizer(config, sample(corpus, config.sample_bytes), cache)


def ready_tokenizer(config: TokenizerConfig) -> "Tokenizer | None":
    """Returns the tokenizer that `config` describes; None if it must be trained."""
    check_tokenizer(config)
    if config.kind is TokenizerKind.bytes:
        return BytesTokenizer()
    if config.path is None:
        return None
    path = Path(config.path).expanduser()
    if config.kind is TokenizerKind.huggingface:
        content = path.read_bytes()
        tokenizer = HuggingFaceTokenizer(content, f"tokenizer.path={path}", config.end or end_beside(path))
        if dropout := dropout_of(content):
            rule = "draws other ids for equal texts, so that two runs of one seed differ; the nearest value is null"
            raise ValueError(f"tokenizer.path={path} must be a tokenizer without dropout: its model.dropout={dropout} {rule}")
        return tokenizer
    return SentencePieceTokenizer(path.read_bytes(), f"tokenizer.path={config.path}")


def trained_tokenizer(config: TokenizerConfig, texts: list[str], cache: Path) -> "Tokenizer":
    """Returns a sentencepiece model trained on `texts`, from `cache` if it is there."""
    folder = cache / "tokenizers" / _key(config, texts)
    if not folder.is_dir():
        _train(texts, config.pieces, folder)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> "Tokenizer":
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
    file = {TokenizerKind.bytes.value: None, TokenizerKind.huggingface.value: TOKENIZER_JSON}.get(about["kind"], MODEL_FILE)
    return {"kind": about["kind"], "path": file and str(folder / file), "end": about.get("end")}


def _saved(folder: Path, about: dict[str, Any]) -> "Tokenizer":
    match about["kind"]:
        case TokenizerKind.bytes.value:
            return BytesTokenizer()
        case TokenizerKind.huggingface.value:
            return HuggingFaceTokenizer((folder / TOKENIZER_JSON).read_bytes(), str(folder), about["end"])
        case _:
            return SentencePieceTokenizer((folder / MODEL_FILE).read_bytes(), str(folder))


class Tokenizer(ABC):
    """Turns text into ids in [0, size) and back."""

    size: int
    """The number of ids."""
    end_of_document: int
    """The id that follows each document in the training data."""
    hash: str
    """Tokenizers with the same hash give the same ids for every text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens before or after it."""

    @abstractmethod
    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """Returns `encode` of each text; the number of threads does not change the ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids` in [0, size), without special tokens; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes into `folder`, made if missing, what `load_tokenizer` reads."""


@final
class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Those trained here decode to the exact text that was encoded; others may not."""

    def __init__(self, model: bytes, origin: str) -> None:
        """model: the bytes of a .model file; origin: its name in errors."""
        self.model = model
        """The bytes of the .model file."""
        self._processor = _processor(model, origin)
        self.size = self._processor.get_piece_size()
        self.end_of_document = self._processor.eos_id()
        self.hash = xxhash.xxh3_128_hexdigest(b"sentencepiece " + model)
        self._mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    def encode(self, text: str) -> list[int]:
        first, *others = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark + self._processor.encode(part)
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        ids = self._processor.encode(texts, num_threads=threads)
        return [self.encode(text) if SPACE_MARK in text else found for text, found in zip(texts, ids, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL_FILE).write_bytes(self.model)
        save_about(self, "sentencepiece", folder)


# sentencepiece represents a space by this character and would decode the character itself as a space; it is encoded as bytes.
SPACE_MARK = "\u2581"


@final
class BytesTokenizer(Tokenizer):
    """Three special tokens (unknown, begin, end of document), then the 256 bytes: the first 259 ids of any model trained here."""

    size = 259
    end_of_document = 2
    hash = xxhash.xxh3_128_hexdigest(b"bytes, 3 marks first")

    def encode(self, text: str) -> list[int]:
        return (np.frombuffer(text.encode(), np.uint8).astype(np.int32) + 3).tolist()

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(index - 3 for index in ids if index >= 3).decode(errors="replace")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_about(self, "bytes", folder)


def save_about(tokenizer: Tokenizer, kind: str, folder: Path, **more: str) -> None:
    """Writes what `load_tokenizer` checks."""
    about = {"kind": kind, "size": tokenizer.size, "end_of_document": tokenizer.end_of_document, "hash": tokenizer.hash, **more}
    (folder / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n")


def _processor(model: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:
        raise ValueError(f"{origin} must be a sentencepiece model") from None
    if processor.eos_id() < 0:
        raise ValueError(f"{origin} must have an end-of-sentence piece; its eos_id is {processor.eos_id()}")
    return processor


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


USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


@final
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, through the `tokenizers` library. Text that looks like a special token is encoded as ordinary pieces."""

    def __init__(self, content: bytes, origin: str, end: str | None = None) -> None:
        """content: the bytes of a tokenizer.json; origin: its name in errors; end: the token that ends a document."""
        from tokenizers import Tokenizer as Library

        try:
            self._library: Any = Library.from_str(content.decode())
        except BaseException as error:  # the library has no error type, and its panics are not an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{origin} must be a tokenizer.json ({' '.join(str(error).split())})") from None
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        if dropout_of(content):  # of a model trained with dropout: outside of training nothing is dropped
            self._library.model.dropout = None
        self.content = content
        """The bytes of the tokenizer.json."""
        self.end = end or self._usual_end(origin)
        found = self._library.token_to_id(self.end)
        if found is None:
            raise ValueError(f"tokenizer.end={self.end} must be a token of {origin}; the usual ones are {', '.join(USUAL_ENDS)}")
        self.end_of_document: int = found
        self.size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        self.hash = xxhash.xxh3_128_hexdigest(f"huggingface {self.end} ".encode() + content)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return [found.ids for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_JSON).write_bytes(self.content)
        save_about(self, "huggingface", folder, end=self.end)

    def _usual_end(self, origin: str) -> str:
        for token in USUAL_ENDS:
            if self._library.token_to_id(token) is not None:
                return token
        raise ValueError(
            f"tokenizer.end=null finds none of {', '.join(USUAL_ENDS)} in {origin}; name the token that ends a document"
        )


def dropout_of(content: bytes) -> float:
    """Returns the probability with which a tokenizer.json drops merges, so that equal texts get different ids; 0 without."""
    return json.loads(content)["model"].get("dropout") or 0.0


def end_beside(path: Path) -> str | None:
    """Returns the eos_token in the tokenizer_config.json next to a tokenizer.json."""
    try:
        token = json.loads((path.parent / "tokenizer_config.json").read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
