"""One safetensors file of a checkpoint: written and hashed in one pass, read by rectangle.

The format is the header's length (8 bytes, little-endian), a JSON header and the tensors' bytes. It is written here because
safetensors' own save_file makes files of mode 0600, holds all tensors in host memory at once and would need a second pass to hash.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from ..parallel.shard import ShardMetadata
from .bounded import check_header, short_message
from .fsync import sync
from .manifest import DamagedCheckpoint, FileRecord

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


def write_safetensors(
    path: Path,
    tensors: dict[str, torch.Tensor],
    on_content: Callable[[str, memoryview], None] | None = None,
    read: Callable[[str], Iterable[torch.Tensor]] | None = None,
) -> FileRecord:
    """Writes `tensors` (on any device) by key to the new file `path`, durably.

    `on_content` is called with each tensor's key and bytes, after they are written. `read(key)` returns the values of a tensor when
    it is written, in one or more consecutive parts, for each of which `on_content` is called; the tensors may then be on the meta
    device.
    """
    keys = file_order(tensors)
    digest = xxhash.xxh3_128()
    # Unbuffered: tensors are large, and a buffer would copy each once more.
    with path.open("xb", buffering=0) as file:
        _write(file, digest, memoryview(header_bytes({key: (tensors[key].dtype, tensors[key].shape) for key in keys})))
        for key in keys:
            for part in [tensors[key]] if read is None else read(key):
                content = content_of(part)
                _write(file, digest, content)
                if on_content is not None:
                    on_content(key, content)
                del content, part  # before the next one is read
        size = file.tell()
        sync(file)
    return FileRecord(size, digest.hexdigest())


def file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the keys in the order of a file: widest elements first, so that each tensor begins at a multiple of its element."""
    return sorted(tensors, key=lambda key: -tensors[key].element_size())


def header_bytes(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    """Returns the header of a file with `tensors` (dtype and shape by key) in this order: the length in 8 bytes, and the JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def content_of(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor, row-major; a copy only where the tensor is on another device or not contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def hash_file(path: Path, counted: Callable[[int], None] = lambda size: None) -> str:
    """Returns xxh3-128 of the file's bytes, as hexadecimal digits. `counted` is called with the bytes of each block."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            counted(count)
    return digest.hexdigest()


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Opens the safetensors file `path`. Raises DamagedCheckpoint if it cannot be read as one."""
    try:
        check_header(path)
        opened = safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedCheckpoint(path, f"checkpoint file {path} is no readable safetensors file: {short_message(error)}") from None
    with opened as file:
        yield file


def read_rectangle(file: Any, key: str, rectangle: ShardMetadata) -> torch.Tensor:
    """Returns a rectangle of the tensor `key` of an open file; other bytes of the file are not read."""
    if rectangle.sizes == rectangle.shape:
        return file.get_tensor(key)
    spans = zip(rectangle.offsets, rectangle.sizes, strict=True)
    return file.get_slice(key)[tuple(slice(offset, offset + size) for offset, size in spans)]


def _write(file: Any, digest: Any, content: memoryview) -> None:
    """Writes and hashes all of `content`: a single write of the operating system may be shorter."""
    for start in range(0, len(content), WRITE_BYTES):
        part = content[start : start + WRITE_BYTES]
        digest.update(part)
        while len(part):
            part = part[file.write(part) :]
