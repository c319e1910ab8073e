"""One safetensors file of a checkpoint: written in one pass together with its hash, read by rectangle.

The format is the header's length (8 bytes, little-endian), a JSON header and the tensors' bytes. It is written here because
safetensors' own save_file makes files of mode 0600, holds all tensors in host memory at once and would need a second pass to hash.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from .bounded import check_header, said
from .fsync import sync
from .manifest import DamagedCheckpoint

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
READ_BYTES = 1 << 22
WRITE_BYTES = 1 << 24


class Written(NamedTuple):
    """A file that is on the disk."""

    bytes: int
    hash: str
    """xxh3-128 of its bytes, as hexadecimal digits."""


def write_shard(path: Path, tensors: dict[str, torch.Tensor], see: Callable[[str, memoryview], None] | None = None) -> Written:
    """Write `tensors` (on any device) by key to the new file `path`, durably. `see` is shown each tensor's bytes as they go by."""
    # Widest elements first: so each tensor begins at a multiple of its element size.
    keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
    digest = xxhash.xxh3_128()
    # Without a buffer: tensors are large, and a copy more would be made of each.
    with path.open("xb", buffering=0) as file:
        _write(file, digest, memoryview(_header(tensors, keys)))
        for key in keys:
            content = content_of(tensors[key])
            _write(file, digest, content)
            if see is not None:
                see(key, content)
        size = file.tell()
        sync(file)
    return Written(size, digest.hexdigest())


def content_of(tensor: torch.Tensor) -> memoryview:
    """Its bytes, row-major; copied to the host, or to lie so, where they do not."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_file(path: Path) -> str:
    """xxh3-128 of the file's bytes, as hexadecimal digits."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The safetensors file `path`, open. DamagedCheckpoint if it is none."""
    try:
        check_header(path)
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(path, f"checkpoint file {path} is no readable safetensors file: {said(error)}") from None
    with opened as file:
        yield file


def read_rectangle(file: Any, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """`sizes` elements from `offsets` on of the tensor `key`; other bytes of the file are not read."""
    view = file.get_slice(key)
    if tuple(sizes) == tuple(view.get_shape()):
        return file.get_tensor(key)
    return view[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]


def _header(tensors: dict[str, torch.Tensor], keys: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: Any, digest: Any, content: memoryview) -> None:
    """All of it: one call of the operating system may write less."""
    for start in range(0, len(content), WRITE_BYTES):
        part = content[start : start + WRITE_BYTES]
        digest.update(part)
        while len(part):
            part = part[file.write(part) :]
