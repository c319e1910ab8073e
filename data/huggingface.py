"""A Hugging Face tokenizer.json as one of our tokenizers, through the `tokenizers` library."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import xxhash

from .tokenizer import TOKENIZER_JSON, Tokenizer, save_about

USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")


@final
class HuggingFaceTokenizer(Tokenizer):
    """Special tokens are never made of text: what looks like one is cut into ordinary pieces."""

    def __init__(self, content: bytes, origin: str, end: str | None = None) -> None:
        """`content`: the bytes of a tokenizer.json; `origin`: what an error calls it; `end`: the token that ends a document."""
        from tokenizers import Tokenizer as Library

        try:
            self._library: Any = Library.from_str(content.decode())
        except Exception as error:  # the library has no error of its own
            raise ValueError(f"{origin} must be a tokenizer.json ({' '.join(str(error).split())})") from None
        self._library.no_padding()
        self._library.no_truncation()
        self._library.encode_special_tokens = True
        if dropout_of(content):  # of a model trained with it: what is drawn while training is not drawn afterwards
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
    """The chance with which a tokenizer.json leaves out merges, so that equal texts get other ids each time; 0 without."""
    return json.loads(content)["model"].get("dropout") or 0.0


def end_beside(path: Path) -> str | None:
    """What the tokenizer_config.json beside a tokenizer.json calls its eos_token."""
    try:
        token = json.loads((path.parent / "tokenizer_config.json").read_text()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
