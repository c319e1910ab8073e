"""A tokenizer.json of anybody's, through the `tokenizers` library, with the files beside it that say which tokens are special.

Text that looks like a special token is ordinary text, except in a prompt.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import xxhash

from .checks import refuse_outside
from .tokenizer_path import COMPANIONS, SPECIAL_TOKENS, TOKENIZER_CONFIG, TOKENIZER_JSON
from .tokenizer_types import Tokenizer, save_about

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
LARGEST_COMPANION = 1 << 24
USUAL_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[SEP]",
)


@final
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json: byte-level BPE, BPE with byte fallback, Unigram or any other model that the library has."""

    def __init__(
        self,
        content: bytes,
        origin: str,
        end: str | None = None,
        begin: str | None = None,
        companions: Mapping[str, bytes] | None = None,
    ) -> None:
        """content: the bytes of a tokenizer.json; origin: its name in errors; companions: the content of COMPANIONS, by name.

        end, begin: the tokens around a document. None finds them: the eos_token, and the bos_token where the tokenizer itself
        puts it before a text, as transformers does. An empty begin is none. Raises ValueError, one line, for what is no tokenizer.
        """
        self.content = content
        """The bytes of the tokenizer.json."""
        self.companions = dict(companions or {})
        """The content of COMPANIONS, by name."""
        self.settings = self._companion(TOKENIZER_CONFIG)
        """The content of tokenizer_config.json."""
        self._library = read_library(content, origin)
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        self.dropout: float = getattr(self._library.model, "dropout", None) or 0.0
        """The probability with which the tokenizer.json drops merges, so that equal texts get different ids. Nothing drops here."""
        if self.dropout:
            self._library.model.dropout = None
        self.end = end or self._named("eos_token") or self._usual_end(origin)
        self.end_of_document = self._id(self.end, "end", origin)
        # By default the token that tokenizer.json puts before a text, as transformers does, unless it is also the end.
        template: list[str] = self._library.encode("", add_special_tokens=True).tokens
        usual_begin = template[0] if template and template[0] != self.end else ""
        self.begin = usual_begin if begin is None else begin
        """The token before a document; empty if there is none."""
        if self.begin:
            self.begin_of_document = self._id(self.begin, "begin", origin)
        self.size = max(self._library.get_vocab(with_added_tokens=True).values()) + 1
        around = f"huggingface {self.end} " + (f"begin {self.begin} " if self.begin else "")
        self.hash = xxhash.xxh3_128_hexdigest(around.encode() + content)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], threads: int) -> list[list[int]]:
        return [found.ids for found in self._library.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_prompt(self, text: str) -> list[int]:
        """As transformers encodes a text: special tokens in it are special tokens, such as those of a chat template."""
        begin = [] if self.begin_of_document is None else [self.begin_of_document]
        self._library.encode_special_tokens = False
        ids = self.encode(text)
        self._library.encode_special_tokens = True
        return (ids if ids[: len(begin)] == begin else [*begin, *ids]) or [self.end_of_document]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        found, special = np.zeros(self.size, np.int64), {token.content for token in self._added() if token.special}
        by_bytes = "ByteLevel" in str(self._library.decoder)  # each character of a token then stands for a byte
        added = {token.content for token in self._added()}
        anchor = self.encode("a")
        before = len(self._library.decode(anchor).encode())
        for token, index in self._library.get_vocab(with_added_tokens=True).items():
            if token in special:
                continue
            if BYTE_TOKEN.fullmatch(token):
                found[index] = 1
            elif token in added:
                found[index] = len(token.encode())
            elif by_bytes:
                found[index] = len(token)
            else:
                found[index] = len(self._library.decode([*anchor, index], skip_special_tokens=False).encode()) - before
        return found

    def _added(self) -> list[Any]:
        return list(self._library.get_added_tokens_decoder().values())

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.companions, TOKENIZER_JSON: self.content}.items():
            (folder / name).write_bytes(content)
        save_about(self, "huggingface", folder, end=self.end, begin=self.begin)

    def special_ids(self) -> dict[str, int]:
        found = {"bos": self.begin or self._named("bos_token"), "eos": self.end, "pad": self._named("pad_token")}
        ids = {f"{key}_token_id": self._library.token_to_id(token) for key, token in found.items() if token}
        return {key: index for key, index in ids.items() if index is not None}

    def _id(self, token: str, key: str, origin: str) -> int:
        found = self._library.token_to_id(token)
        if found is None:
            usual = ", ".join(USUAL_ENDS)
            raise ValueError(f"tokenizer.{key}={token} must be a token of {origin}; the usual ends of a document are {usual}")
        return found

    def _named(self, key: str) -> str | None:
        """The special token `key` of the files beside the tokenizer.json."""
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
            token = self._companion(name).get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
        return None

    def _companion(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self.companions.get(name, b"{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _usual_end(self, origin: str) -> str:
        for token in USUAL_ENDS:
            if self._library.token_to_id(token) is not None:
                return token
        raise ValueError(
            f"tokenizer.end=null finds none of {', '.join(USUAL_ENDS)} in {origin}; name the token that ends a document"
        )


def read_library(content: bytes, origin: str) -> Any:
    """Returns the library's tokenizer. Raises ValueError, one line, if `content` is none or the library is not installed."""
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise ValueError(f"{origin} is read by the tokenizers library, which is not installed: pip install tokenizers") from None
    try:
        return Library.from_str(content.decode())
    except BaseException as error:  # the library has no error type, and its panics are not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ValueError(f"{origin} must be a tokenizer.json ({' '.join(str(error).split())})") from None


def read_companions(folder: Path) -> dict[str, bytes]:
    """Returns the content of the COMPANIONS in `folder`. Raises ValueError for a link out of it, or one too large."""
    found = {name: folder / name for name in COMPANIONS if (folder / name).is_file()}
    refuse_outside(folder, map(str, found.values()), "tokenizer.path")
    for path in found.values():
        if (size := path.stat().st_size) > LARGEST_COMPANION:
            raise ValueError(f"{path} has {size} bytes, more than {LARGEST_COMPANION}")
    return {name: path.read_bytes() for name, path in found.items()}
