"""Finds shards by path, pattern or URL, opens them with any compression, and identifies their version."""

import bz2
import glob
import gzip
import io
import lzma
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import IO, Any

import xxhash

from ..checks import refuse_outside
from .http import HttpFile, RetryPolicy, is_transient, open_url, retry_call

ENDINGS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson", ".json"), "lines": (".txt", ".lines")}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
NUMBER_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_files(path: str, kind: str) -> list[str]:
    """Returns the shards at `path`, sorted. Raises ValueError if there is none, or if a link in a folder leads out of it."""
    if is_remote(path):
        return list(_expand_numbers(path))
    place = Path(path).expanduser()
    if place.is_dir():
        endings = tuple(ending + packed for ending in ENDINGS[kind] for packed in ("", *COMPRESSED))
        found = [str(file) for file in place.rglob("*") if file.is_file() and file.name.endswith(endings)]
        refuse_outside(place, found, "data.path")
    else:
        patterns = _expand_numbers(str(place))
        # Path.glob does not take absolute patterns.
        found = [file for each in patterns for file in glob.glob(each, recursive=True) if Path(file).is_file()]  # noqa: PTH207
    if not found:
        wanted = f"a file, a folder with files of kind {kind} ({', '.join(ENDINGS[kind])}), a pattern that matches some, or a URL"
        raise ValueError(f"data.path={path}: must be {wanted}; {_other_files(place)}")
    return sorted(found)


def _other_files(place: Path) -> str:
    """Returns what a folder without files of the wanted kind holds, in words."""
    endings = Counter(file.suffix for file in islice(place.rglob("*"), 10_000) if file.is_file()) if place.is_dir() else Counter()
    if not endings:
        return "there is no file"
    ending, count = endings.most_common(1)[0]
    return f"it has {count} of *{ending}; nearest valid: data=text data.pattern='**/*{ending}' if they are text"


def is_remote(path: str) -> bool:
    return "://" in path


@contextmanager
def open_shard(path: str, retry: RetryPolicy, version: bytes) -> Iterator[IO[bytes]]:
    """Opens the decompressed bytes. Closes the raw file as well, which decompressors do not."""
    with open_raw(path, retry, version) as raw, decompressed(raw, path) as file:
        yield file
        if file is not raw and raw.tell() == 0:
            raise EOFError("the file is empty, which no compressed file is")


@contextmanager
def open_raw(path: str, retry: RetryPolicy, version: bytes) -> Iterator[IO[bytes]]:
    """Opens the bytes as stored: a local file, http(s), or another protocol that fsspec knows, such as hf://.

    Raises ValueError if the file has not this version (see `versions`), or changes before the end of the block.
    """
    if path.startswith(("http://", "https://")):
        with open_url(path, retry) as file:
            _refuse_change(_url_version(file.raw), version)
            yield file
    elif is_remote(path):
        with open_remote(path) as file:
            yield file
    else:
        _refuse_change(_local_version(path), version)
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            yield file
            _refuse_change(b"%d" % os.fstat(file.fileno()).st_size, b"%d" % size)


def decompressed(file: IO[bytes], path: str) -> Any:
    """Returns a context with the decompressed `file`; the compression follows from the suffix of `path`. Leaves `file` open."""
    match Path(path.partition("?")[0]).suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".bz2":
            return bz2.BZ2File(file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            import pyarrow

            # A small buffer, since its content is lost where the stream breaks off.
            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 14)
        case _:
            return nullcontext(file)


def short_names(paths: list[str]) -> list[str]:
    """Returns the paths relative to their common folder, so that they do not depend on where the data lies."""
    shared = len(_folder_of_all([path.split("/")[:-1] for path in paths]))
    return ["/".join(path.split("/")[shared:]) for path in paths]


def fingerprint(paths: list[str], versions: list[bytes], *more: str) -> str:
    """Returns xxh3-128 of the names of the shards, their versions and `more`."""
    running = xxhash.xxh3_128(repr(more).encode())
    for name, version in zip(short_names(paths), versions, strict=True):
        running.update(f"{name}\0".encode(errors="surrogateescape") + version + b"\0")
    return running.hexdigest()


def versions(paths: list[str], retry: RetryPolicy) -> list[bytes]:
    """Returns the version of each file. Raises ValueError, one line, for a file that cannot be read.

    A local file: its size and a hash of its first and last 64 KiB. An http(s) URL: its size and the server's ETag or date. Other
    URLs: themselves, as those of the hub hold the commit.
    """
    return [retry_call(lambda path=path: _version(path, retry), path, retry) for path in paths]


def _version(path: str, retry: RetryPolicy) -> bytes:
    if path.startswith(("http://", "https://")):
        with HttpFile(path, retry) as file:
            return _url_version(file)
    try:
        return path.encode() if is_remote(path) else _local_version(path)
    except OSError as error:
        if is_transient(error):
            raise
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _url_version(file: Any) -> bytes:
    return f"{file.size} {file.tag}".encode()


def _local_version(path: str) -> bytes:
    size, edge = Path(path).stat().st_size, 1 << 16
    with Path(path).open("rb") as file:
        ends = file.read(edge)
        file.seek(max(0, size - edge))
        return b"%d " % size + xxhash.xxh3_128_digest(ends + file.read(edge))


def _refuse_change(now: bytes, before: bytes) -> None:
    if now != before:
        sizes = (int(version.partition(b" ")[0]) for version in (before, now))
        raise ValueError("the file changed since the run began: it had {} bytes and now has {}".format(*sizes))


def _folder_of_all(folders: list[list[str]]) -> list[str]:
    shared = folders[0]
    for folder in folders:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, folder, strict=False)) if a != b), len(folder))]
    return shared


def _expand_numbers(path: str) -> Iterator[str]:
    """Expands {000..127} to each of its numbers, with as many digits."""
    found = NUMBER_RANGE.search(path)
    if found is None:
        yield path
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _expand_numbers(f"{path[: found.start()]}{number:0{len(found[1])}}{path[found.end() :]}")


def open_remote(path: str) -> IO[bytes]:
    """Returns a file behind any protocol that fsspec knows."""
    import fsspec

    file: Any = fsspec.open(path, "rb")
    return file.open()
