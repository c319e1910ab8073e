"""Reads files that may come from anybody: only regular ones, up to a size limit, and as strict JSON. No torch here."""

import json
import os
import stat
from pathlib import Path
from typing import Any

LEAST_LIMIT = 1 << 24
"""Bytes that a JSON file or a header may always have; more only if it describes tensors."""
TENSOR_BYTES_PER_BYTE = 1024
"""Bytes of tensors that allow one more byte of JSON: a chunk takes about 150 bytes to describe, and holds more than 150 KiB."""
MOST_DIMENSIONS = 16
LONGEST_NAME = 512
LONGEST_HEADER = 100_000_000
"""Bytes of a safetensors header, by its format."""
LARGEST_TOKENIZER = 1 << 27
"""Bytes; the largest published ones have a third of that."""


def read_regular(path: Path, limit: int) -> bytes:
    """Returns the content of `path`.

    Raises ValueError if it is not a regular file (a pipe, a device) or has more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is no regular file")
        if status.st_size > limit:
            raise ValueError(f"{path} has {status.st_size} bytes, more than the {limit} that are read of such a file")
        return file.read(limit + 1)[:limit]


def strict_json(text: bytes) -> Any:
    """Parses a JSON text.

    Raises ValueError for a key that occurs twice, NaN, deep nesting, or more small values than its size explains.
    """
    # An estimate of the memory that the parsed values would take, by kind of value.
    cost = 200 * (text.count(b"[") + text.count(b"{")) + 30 * text.count(b'"') + 32 * text.count(b",")
    if cost > 12 * max(len(text), LEAST_LIMIT):
        raise ValueError("it has more values than what is described so can have")
    try:
        content = json.loads(text.decode(), object_pairs_hook=_object, parse_constant=_refuse)
        if b"\\u" in text:  # a lone surrogate cannot be printed, nor be a name
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds a half of a character") from None
    return content


def file_bytes(folder: Path) -> int:
    """Returns the bytes of all files in `folder`."""
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file(follow_symlinks=True))


def json_limit(size: int) -> int:
    """Returns the most bytes that JSON may have that describes tensors of `size` bytes."""
    return LEAST_LIMIT + size // TENSOR_BYTES_PER_BYTE


def check_header(path: Path) -> None:
    """Raises ValueError if `path` is not a regular file, or its safetensors header is too long for its size."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if length > min(size - 8, json_limit(size), LONGEST_HEADER):
            raise ValueError(f"{path} has a header of {length} bytes in {size}")


def check_name(value: object) -> str:
    """Returns the name of a tensor, a key or a file. Raises ValueError unless it is short and printable."""
    if not isinstance(value, str) or len(value) > LONGEST_NAME or not value.isprintable():
        raise ValueError(f"{brief(value)} must be a name of at most {LONGEST_NAME} printable characters")
    return value


def short_message(error: object) -> str:
    """Returns the first 400 characters of the message, in one line: it may repeat whatever a file holds."""
    return " ".join(str(error).split())[:400]


def brief(value: object) -> str:
    """Returns the `repr` of a value, cut to 60 characters."""
    text = repr(value[:60] if isinstance(value, str | list | tuple) else value if not isinstance(value, dict) else {})
    return text if len(text) <= 60 else f"{text[:60]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {brief(twice)} stands there twice")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")
