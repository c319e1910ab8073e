"""One safetensors file of a checkpoint: written in one pass together with its hash, read by rectangle.

The format is the header's length (8 bytes, little-endian), a JSON header and the tensors' bytes. It is written here because
safetensors' own save_file makes files of mode 0600, holds all tensors in host memory at once and would need a second pass to hash.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

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


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Write `tensors` (on any device) by key to the new file `path`, durably; its bytes and its xxh3-128 hash."""
    # Widest elements first: so each tensor begins at a multiple of its element size.
    keys = sorted(tensors, key=lambda key: -tensors[key].element_size())
    digest = xxhash.xxh3_128()
    with path.open("xb") as file:
        for part in _parts(tensors, keys):
            digest.update(part)
            file.write(part)
        size = file.tell()
        sync(file)
    return size, digest.hexdigest()


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
    """The safetensors file `path`, open. ValueError if it is none."""
    try:
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint file {path} is no readable safetensors file: {error}") from None
    with opened as file:
        yield file


def read_rectangle(file: Any, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """`sizes` elements from `offsets` on of the tensor `key`; other bytes of the file are not read."""
    view = file.get_slice(key)
    if tuple(sizes) == tuple(view.get_shape()):
        return file.get_tensor(key)
    return view[tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))]


def sync(file: Any) -> None:
    """Return only when the written `file` is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return only when the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parts(tensors: dict[str, torch.Tensor], keys: list[str]) -> Iterator[Any]:
    """The bytes of the file, in order; one tensor at a time is copied to the host."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        tensor = tensors[key]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in keys:
        yield tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
