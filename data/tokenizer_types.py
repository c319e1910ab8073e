"""The kinds of tokenizers: text to token ids and back. Those trained here do that exactly."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import sentencepiece
import xxhash

from .tokenizer_path import MODEL_FILE

ABOUT_FILE = "tokenizer_about.json"


class Tokenizer(ABC):
    """Turns text into ids in [0, size) and back."""

    size: int
    """The number of ids."""
    end_of_document: int
    """The id that follows each document in the training data."""
    begin_of_document: int | None = None
    """The id that precedes each document in the training data, and a prompt; None if nothing does."""
    hash: str
    """Tokenizers with the same hash give the same ids for every text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens before or after it."""

    @abstractmethod
    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        """`encode` of each text; the number of threads does not change the ids."""

    def encode_documents(self, texts: list[str], threads: int) -> list[list[int]]:
        """Returns the ids of each text between begin_of_document, if there is one, and end_of_document."""
        begin = [] if self.begin_of_document is None else [self.begin_of_document]
        return [[*begin, *ids, self.end_of_document] for ids in self.encode_batch(texts, threads)]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of the beginning of a document that a model is to continue; at least one."""
        begin = [] if self.begin_of_document is None else [self.begin_of_document]
        return [*begin, *self.encode(text)] or [self.end_of_document]

    def special_ids(self) -> dict[str, int]:
        """Returns bos_token_id, eos_token_id and pad_token_id, those that there are."""
        return {"eos_token_id": self.end_of_document}

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` in [0, size), without special tokens; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """Returns the UTF-8 bytes of text that each id stands for, (size,) int64; 0 for special tokens.

        Where ids decode to the exact text, those of a text add up to its bytes. Otherwise they are bytes of the decoded text, and a
        space that the tokenizer puts before a text counts.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write into `folder`, made if missing, what `load_tokenizer` reads."""


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
        kept = self._processor.normalize("  a \ufb01 ") == "  a \ufb01 ".replace(" ", SPACE_MARK)
        self.verbatim = kept and self._processor.unk_id() not in self._mark
        """Whether a text is encoded as it is: no space is put before it, none is removed, no character replaced or unknown."""

    def encode(self, text: str) -> list[int]:
        if not self.verbatim:
            return self._processor.encode(text)
        first, *others = text.split(SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark + self._processor.encode(part)
        return ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        ids = self._processor.encode(texts, num_threads=threads)
        if not self.verbatim:
            return ids
        return [self.encode(text) if SPACE_MARK in text else found for text, found in zip(texts, ids, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def byte_lengths(self) -> np.ndarray:
        model, found = self._processor, np.zeros(self.size, np.int64)
        for index in range(self.size):
            if model.is_byte(index):
                found[index] = 1
            elif model.is_unknown(index):
                found[index] = len(model.decode([index]).encode())
            elif not model.is_control(index):
                found[index] = len(model.id_to_piece(index).replace(SPACE_MARK, " ").encode())
        return found

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

    def byte_lengths(self) -> np.ndarray:
        return (np.arange(self.size) >= 3).astype(np.int64)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_about(self, "bytes", folder)


def save_about(tokenizer: Tokenizer, kind: str, folder: Path, **more: str) -> None:
    """Write what `load_tokenizer` checks."""
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
