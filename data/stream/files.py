"""Finding shards by path, pattern or URL, opening them whatever they are compressed with, and telling them from others."""

import bz2
import glob
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import xxhash

from .remote import HttpFile, Patience, open_url

ENDINGS = {"parquet": (".parquet",), "jsonl": (".jsonl", ".ndjson", ".json"), "lines": (".txt", ".lines")}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
COUNT = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_files(path: str, kind: str) -> list[str]:
    """All shards that `path` means, sorted. ValueError if there is none."""
    if is_remote(path):
        return list(_counted(path))
    place = Path(path).expanduser()
    if place.is_dir():
        endings = tuple(ending + packed for ending in ENDINGS[kind] for packed in ("", *COMPRESSED))
        found = [str(file) for file in place.rglob("*") if file.is_file() and file.name.endswith(endings)]
    else:
        found = [file for each in _counted(str(place)) for file in _matching(each) if Path(file).is_file()]
    if not found:
        raise ValueError(
            f"data.path={path} must be a file, a folder with files of kind {kind}, a pattern that matches some, or a URL"
        )
    return sorted(found)


def _matching(pattern: str) -> list[str]:
    return glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob wants relative patterns, users write absolute ones


def is_remote(path: str) -> bool:
    return "://" in path


@contextmanager
def open_shard(path: str, patience: Patience) -> Iterator[IO[bytes]]:
    """The decompressed bytes. Closes what lies below as well, which decompressors do not."""
    with open_raw(path, patience) as raw, decompressed(raw, path) as file:
        yield file


def open_raw(path: str, patience: Patience) -> IO[bytes]:
    """The bytes as stored: local, http(s), or whatever `datasets` reaches, as hf://."""
    if path.startswith(("http://", "https://")):
        return open_url(path, patience)
    if is_remote(path):
        from .hub import open_remote

        return open_remote(path)
    return Path(path).open("rb")


def decompressed(file: IO[bytes], path: str) -> Any:
    """What is in `file`, by the ending of its name; `file` itself if that is none of a compression."""
    match Path(path.partition("?")[0]).suffix:
        case ".gz":
            return gzip.GzipFile(fileobj=file)
        case ".bz2":
            return bz2.BZ2File(file)
        case ".xz":
            return lzma.LZMAFile(file)
        case ".zst":
            import pyarrow

            # A small buffer: where the stream breaks off, what is in the buffer is lost.
            return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 14)
        case _:
            return file


def short_names(paths: list[str]) -> list[str]:
    """The paths below the folder that all have in common: they do not depend on where the data lies."""
    shared = len(_folder_of_all([path.split("/")[:-1] for path in paths]))
    return ["/".join(path.split("/")[shared:]) for path in paths]


def fingerprint(paths: list[str], *more: str, patience: Patience) -> str:
    """xxh3-128 over the names of the shards and what tells another version of a shard from this one.

    Of a local file: its size, and its first and last 64 KiB. Of a URL: its size and the server's ETag or date. The URLs of hub data
    sets hold the commit.
    """
    running = xxhash.xxh3_128(repr(more).encode())
    for name, path in zip(short_names(paths), paths, strict=True):
        running.update(f"{name}\0".encode(errors="surrogateescape") + _version(path, patience) + b"\0")
    return running.hexdigest()


def _version(path: str, patience: Patience) -> bytes:
    if path.startswith(("http://", "https://")):
        with HttpFile(path, patience) as file:
            return f"{file.size} {file.tag}".encode()
    if is_remote(path):
        return path.encode()
    size, edge = Path(path).stat().st_size, 1 << 16
    with Path(path).open("rb") as file:
        ends = file.read(edge)
        file.seek(max(0, size - edge))
        return b"%d " % size + xxhash.xxh3_128_digest(ends + file.read(edge))


def _folder_of_all(folders: list[list[str]]) -> list[str]:
    shared = folders[0]
    for folder in folders:
        shared = shared[: next((i for i, (a, b) in enumerate(zip(shared, folder, strict=False)) if a != b), len(folder))]
    return shared


def _counted(path: str) -> Iterator[str]:
    """{000..127} as each of its numbers, with as many digits."""
    found = COUNT.search(path)
    if found is None:
        yield path
        return
    for number in range(int(found[1]), int(found[2]) + 1):
        yield from _counted(f"{path[: found.start()]}{number:0{len(found[1])}}{path[found.end() :]}")
