"""The shards of a source and their rows, read from any row on. A row that cannot be read is yielded as a BadRow, never skipped."""

import gzip
import json
import lzma
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, final

import numpy as np

from ..config import Corpus, DataConfig
from .files import fingerprint, open_raw, open_shard, short_names, versions
from .http import RetryPolicy, is_transient, retry_items

BATCH_ROWS = 256
"""Rows read at a time, in formats that have batches."""
LINE_OVERHEAD = 1 << 20
"""Bytes that a line may have in addition to its document."""
ESCAPED = 6
"""Most bytes that JSON takes for one byte of a document."""
SKIPPED_BYTES = 1 << 20
"""Bytes read at a time of a line that is too long."""
NO_ROW_FACTOR = 32
"""A line of this many times the longest row is not skipped: the shard fails."""


class BadRow(NamedTuple):
    """A row without usable text or ids."""

    reason: str


class FailedShard(NamedTuple):
    """Yielded in place of the rows of a shard from one that cannot be read on."""

    reason: str


class ShardFiles(NamedTuple):
    """The files of a source, with what another process needs to read them and need not find out again."""

    kind: Corpus
    """parquet, jsonl or lines."""
    paths: list[str]
    versions: list[bytes]


Row = bytes | np.ndarray | BadRow
"""The UTF-8 text of a document, its token ids, or a BadRow."""


class Shards(ABC):
    names: list[str]
    """Name of each shard in messages."""
    fingerprint: str
    """Hash of what identifies the data."""
    files: ShardFiles | None = None
    """None if `datasets` reads them."""

    _retry: RetryPolicy

    def rows(self, shard: int, first: int) -> Iterator[Row | FailedShard]:
        """Yields the rows of a shard from row `first` on. Raises DataUnavailable if its source does not answer.

        If the shard fails, the last item is a FailedShard, at the same row wherever reading began.
        """
        return retry_items(lambda row: self._read(shard, row), first, self.names[shard], self._retry)

    @abstractmethod
    def _read(self, shard: int, first: int) -> Iterator[Row | FailedShard]:
        """Like `rows`, but raises transient errors of the source."""


def find_shards(paths: list[str], kind: Corpus, config: DataConfig, retry: RetryPolicy) -> Shards:
    """Returns shards in the format `kind`, after a look at each of them for its version."""
    return file_shards(ShardFiles(kind, paths, versions(paths, retry)), config, retry)


def file_shards(files: ShardFiles, config: DataConfig, retry: RetryPolicy) -> Shards:
    """Returns the shards of files that have been looked at. Opens none."""
    if files.kind is Corpus.parquet:
        return ParquetShards(files, config.column, retry)
    return LineShards(files, config.column if files.kind is Corpus.jsonl else None, retry, config.longest_row)


@final
class LineShards(Shards):
    """A row for each line: a JSON object with the text at `key`, or (key None) the text itself."""

    def __init__(self, files: ShardFiles, key: str | None, retry: RetryPolicy, longest: int = DataConfig.longest_row) -> None:
        self.files, self.names = files, short_names(files.paths)
        self.fingerprint = fingerprint(files.paths, files.versions, "lines", str(key))
        self._paths, self._versions, self._key, self._retry, self._longest = files.paths, files.versions, key, retry, longest

    def _read(self, shard: int, first: int) -> Iterator[Row | FailedShard]:
        try:
            with open_shard(self._paths[shard], self._retry, self._versions[shard]) as file:
                for row, line in enumerate(bounded_lines(file, self._longest, 1 if self._key is None else ESCAPED)):
                    if row >= first:
                        if isinstance(line, BadRow):
                            yield line
                        else:
                            yield line.rstrip(b"\r\n") if self._key is None else json_row(line, self._key)
        except BROKEN_FILE as error:
            if is_transient(error):
                raise
            yield FailedShard(error_text(error))


def bounded_lines(file: IO[bytes], longest: int, escaped: int) -> Iterator[bytes | BadRow]:
    """Yields the lines of a file; a BadRow for one that is no document of at most `longest` bytes, each in up to `escaped` bytes.

    ValueError for an excessive line: a small compressed file may hold one that would take hours to read.
    """
    most, size = escaped * longest + LINE_OVERHEAD, 0
    while line := file.readline(most):
        size = len(line)
        if size < most or line.endswith(b"\n"):
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(SKIPPED_BYTES)):
            size += len(line)
            if size > NO_ROW_FACTOR * (longest + LINE_OVERHEAD):
                raise ValueError(f"a row of more than {size} bytes, and data.longest_row={longest}")
        yield BadRow(f"{size} bytes, more than data.longest_row={longest}")


@final
class ParquetShards(Shards):
    """The rows of one column. Row groups before the first wanted row are not read."""

    def __init__(self, files: ShardFiles, column: str, retry: RetryPolicy) -> None:
        self.files, self.names = files, short_names(files.paths)
        self.fingerprint = fingerprint(files.paths, files.versions, "parquet", column)
        self._paths, self._versions, self._column, self._retry = files.paths, files.versions, column, retry

    def _read(self, shard: int, first: int) -> Iterator[Row | FailedShard]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 0
        try:
            with open_raw(self._paths[shard], self._retry, self._versions[shard]) as raw, pq.ParquetFile(raw) as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                group = 0
                while group < len(sizes) and row + sizes[group] <= first:
                    row, group = row + sizes[group], group + 1
                names = file.schema_arrow.names
                if self._column not in names:
                    yield no_column(self._column, names)
                    return
                # Group by group, so that batches, and the rows lost with a damaged one, are the same wherever reading begins.
                for batch in (b for at in range(group, len(sizes)) for b in file.iter_batches(BATCH_ROWS, [at], [self._column])):
                    for item in column_rows(batch.column(0)):
                        if row >= first:
                            yield item
                        row += 1
        except (pa.ArrowException, *BROKEN_FILE) as error:
            if is_transient(error):
                raise
            yield FailedShard(error_text(error))


BROKEN_FILE = (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)
"""Errors of truncated or damaged files, apart from transient ones."""


def no_column(column: str, names: list[str]) -> FailedShard:
    """Returns the failure of a shard that lacks the column."""
    return FailedShard(f"no column {column}, there are {', '.join(names[:8])}")


def error_text(error: BaseException) -> str:
    """Returns the message in one line, without the path: the shard's name is added to it. In our words for what libraries say."""
    import pyarrow as pa

    if isinstance(error, EOFError) and "end-of-stream" in str(error):
        return "it is cut off: its compressed data have no end"
    if isinstance(error, zlib.error | lzma.LZMAError | gzip.BadGzipFile):
        return "its compressed data are damaged"
    if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
        return "its data are damaged or cut off"
    return " ".join(str(getattr(error, "strerror", None) or error).split())


def column_rows(values: Any) -> list[Row]:
    """Returns the rows of an Arrow array of text or of lists of ids."""
    import pyarrow as pa
    import pyarrow.types as kinds

    if kinds.is_string(values.type) or kinds.is_large_string(values.type):
        # As bytes: Arrow does not check that text is UTF-8, and a bad row must not fail the others of its batch.
        texts = values.cast(pa.large_binary() if kinds.is_large_string(values.type) else pa.binary()).to_pylist()
        return [BadRow("null") if text is None else text for text in texts]
    return [_arrow_row(value) for value in values]


def _arrow_row(value: Any) -> Row:
    """Returns the row of an Arrow value; a BadRow if Python cannot represent it, such as a date after the year 9999."""
    try:
        return value_row(value.as_py())
    except Exception as error:  # the errors depend on the column's type
        return BadRow(f"is {value.type}, which cannot be read ({error_text(error)})")


def value_row(value: Any) -> Row:
    """Returns the row of a Python value."""
    match value:
        case str():
            return value.encode(errors="surrogatepass")
        case None:
            return BadRow("null")
        case list() if value and all(type(item) is int for item in value):
            beyond = [item for item in value if not -(2**63) <= item < 2**63]
            return BadRow(f"id {str(beyond[0])[:24]} is no int64") if beyond else np.array(value, dtype=np.int64)
        case list() if not value:
            return BadRow("empty")
        case _:
            return BadRow(f"is {type(value).__name__}, not text")


def json_row(line: bytes, key: str) -> Row:
    """Returns the row of a line of JSON with the text at `key`."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("no JSON")
    if not isinstance(record, dict):
        return BadRow("no JSON object")
    if key not in record:
        return BadRow(f"no key {key}")
    return value_row(record[key])
