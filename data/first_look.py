"""The first look at the files of a run, before ranks, tokenizer or model: each is opened as what it claims to be.

An error names the first cause: the file, the line or the column, and what would be right. At most MOST_FILES of a source
are opened.
"""

import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from .checks import pattern_files
from .config import STREAMED, Corpus, DataConfig, mixture_sources
from .errors import DataUnavailable
from .hub_answer import ask_hub
from .pretokenized import MANIFEST_FILE, read_manifest
from .signatures import BINARY, PARQUET, SIGNATURES, SUFFIX_OF, UTF_16, content, kind_for
from .stream.files import COMPRESSED, decompressed, find_files, is_remote
from .stream.shards import ESCAPED, LINE_OVERHEAD, BadRow, json_row

MOST_FILES = 16
"""Of a source, spread over all."""
FIRST_ROWS = 256
"""Rows that are read of a file with lines."""
FIRST_BYTES = 1 << 22
"""And their bytes."""
LAST_BYTES = 1 << 16
WHOLE_BYTES = 1 << 23
"""A compressed file up to this size is unpacked to its end, up to 8 times this, since only that shows whether it is whole."""


class Fault(NamedTuple):
    """Why a file cannot be read as what it claims to be."""

    what: str
    nearest: str
    """A setting or a command that would be right."""


def look_at_data(config: DataConfig) -> None:
    """Raises ValueError, one line, for the first file that is not what it claims to be; DataUnavailable if the hub does not answer.

    Files that fail are tolerated up to data.max_failed_files, as in training, unless all that are opened fail. URLs are not opened.
    """
    for part in mixture_sources(config):
        source = part.config
        if source.corpus is Corpus.prepared:
            _look_at_shards(source)
        elif source.corpus is Corpus.hf:
            _look_at_hub(source)
        elif source.path is not None and not is_remote(source.path):
            _look_at_files(source)


def _look_at_files(config: DataConfig) -> None:
    assert config.path is not None
    root = Path(config.path).expanduser()
    if config.corpus in STREAMED:
        files = find_files(config.path, config.corpus.value)
    else:
        files = [str(root / name) for name in sorted(pattern_files(root, config.pattern))] if root.is_dir() else [str(root)]
    step = max(1, -(-len(files) // MOST_FILES))
    chosen = files[::step]
    # Documents of data=text that are no text are counted and left out.
    tolerated = config.max_failed_files if config.corpus in STREAMED else len(chosen)
    faults = [(file, fault) for file in chosen if (fault := first_fault(file, config)) is not None]
    if faults and (len(faults) > tolerated or len(faults) == len(chosen)):
        file, fault = faults[0]
        raise ValueError(f"data.path={file}: {fault.what}; nearest valid: {fault.nearest}")


def first_fault(file: str, config: DataConfig) -> Fault | None:
    """Returns what is wrong with the local `file` as a file of `config.corpus`, None if the look finds nothing."""
    path = Path(file)
    try:
        with path.open("rb") as raw:
            head = raw.read(FIRST_ROWS)
        if not head:
            return Fault("is empty", "another file, or leave it out")
        if config.corpus is Corpus.parquet:
            return _parquet_fault(path, head, config)
        return _packing_fault(path, head, config) or _text_fault(path, config)
    except OSError as error:
        return Fault(f"cannot be read ({error.strerror or 'input/output error'})", "a file that can be read")


# Parquet.


def _parquet_fault(path: Path, head: bytes, config: DataConfig) -> Fault | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = content(head)
    if found != PARQUET:
        return Fault(f"is no parquet file, it holds {found}", kind_for(found))
    with path.open("rb") as raw:
        raw.seek(-4, io.SEEK_END)
        if raw.read() != b"PAR1":
            return Fault("is a parquet file that is cut off: it does not end with its footer", "copy it again, or leave it out")
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError, ValueError):
        return Fault("is a damaged parquet file: its footer cannot be read", "copy it again, or leave it out")
    kinds = {field.name: field.type for field in schema}
    texts = [name for name, kind in kinds.items() if _holds_text(kind)]
    if config.column not in kinds:
        return no_column(config.column, list(kinds), texts)
    if metadata.num_rows == 0:
        return Fault("has no rows", "another file, or leave it out")
    if _all_null(metadata, config.column) or pa.types.is_null(kinds[config.column]):
        return Fault(f"column {config.column} is null in all {metadata.num_rows:,} rows", nearest_column(config.column, texts))
    if config.column not in texts:
        rule = f"column {config.column} is {kinds[config.column]}, not text or a list of token ids"
        return Fault(rule, nearest_column(config.column, texts))
    return None


def _holds_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    if kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind):
        return kinds.is_integer(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def _all_null(metadata: Any, column: str) -> bool:
    """Whether the statistics of all row groups say so; False if there are none."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = [group.column(index) for index in range(group.num_columns)]
        of_column = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
        if not of_column or of_column[0] is None or of_column[0].null_count != group.num_rows:
            return False
    return True


# Lines and texts.


def _packing_fault(path: Path, head: bytes, config: DataConfig) -> Fault | None:
    """What is wrong with the compression that the name of a file says; files of data=text are read as they are."""
    found, suffix = content(head), path.suffix if path.suffix in COMPRESSED and config.corpus in STREAMED else ""
    packed = SUFFIX_OF.get(found, "")
    if suffix and packed != suffix:
        return Fault(f"its name says {suffix}, and it is {found}", f"rename it {_named(path.with_suffix(packed), found)}")
    if packed and not suffix:
        rename = f"gunzip < {path} > {path.name}.txt" if config.corpus is Corpus.text else f"rename it {path.name}{packed}"
        return Fault(f"is {found}, which its name does not say", rename)
    if suffix and path.stat().st_size <= WHOLE_BYTES:
        try:
            with path.open("rb") as raw, decompressed(raw, str(path)) as file:
                for _ in range(8):
                    if not file.read(WHOLE_BYTES):
                        break
        except EOFError:
            return Fault(f"is {found} that is cut off: it has no end", "copy it again, or leave it out")
        except (zlib.error, lzma.LZMAError, OSError, ValueError):
            return Fault(f"is {found} that is damaged", "copy it again, or leave it out")
    return None


def _named(path: Path, found: str) -> str:
    return f"{path.name}; or {kind_for(found)}" if found in (PARQUET, UTF_16, BINARY) else path.name


def _text_fault(path: Path, config: DataConfig) -> Fault | None:
    name = path.name if config.corpus in STREAMED else ""
    with path.open("rb") as raw, decompressed(raw, name) as file:
        try:
            start = file.read(FIRST_BYTES)
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError):
            return None  # a larger file that fails: the rows before the failure may be used
    found = content(start)
    if not start:
        return Fault("holds nothing when it is unpacked", "another file, or leave it out")
    if found in (BINARY, *SIGNATURES.values()):
        return Fault(f"holds {found}, and UTF-8 text is read", kind_for(found))
    if config.corpus is not Corpus.jsonl:
        return None
    most = ESCAPED * config.longest_row + LINE_OVERHEAD
    whole = start if len(start) < FIRST_BYTES else start[: start.rfind(b"\n") + 1]
    lines = [line for line in whole.split(b"\n", FIRST_ROWS)[:FIRST_ROWS] if line.strip() and len(line) <= most]
    return (_lines_fault(start, lines, config.column) if lines else None) or _last_line_fault(path, len(lines))


def _lines_fault(start: bytes, lines: list[bytes], column: str) -> Fault | None:
    """What is wrong if none of the first lines is an object with text at `column`."""
    rows = [json_row(line, column) for line in lines]
    if not all(isinstance(row, BadRow) for row in rows):
        return None
    records = [record for line in lines if isinstance(record := _parsed(line), dict)]
    if start.lstrip()[:1] == b"[":
        return Fault("is one JSON array, and an object a line is read", "jq -c '.[]' FILE > FILE.jsonl")
    if not records:
        if start.lstrip()[:1] == b"{":
            return Fault("line 1 is no whole JSON object: one may be spread over several lines", "jq -c . FILE > FILE.jsonl")
        return Fault(f"line 1 is no JSON object: {_excerpt(lines[0])}", "data=text, which takes any text, or data=lines")
    keys = list(dict.fromkeys(key for record in records for key in record))
    texts = [key for key in keys if any(isinstance(record.get(key), str) for record in records)]
    if column not in keys:
        return no_column(column, keys, texts)
    reason = next(row.reason for row in rows if isinstance(row, BadRow))
    many = f"and so in all {len(rows)} lines that were read" if len(rows) > 1 else "the only one"
    return Fault(f"line 1: {column} {'is null' if reason == 'null' else reason}, {many}", nearest_column(column, texts))


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _last_line_fault(path: Path, lines: int) -> Fault | None:
    """A file that ends inside of a JSON object was cut off while it was written or copied."""
    if path.suffix in COMPRESSED:
        return None
    with path.open("rb") as raw:
        size = raw.seek(0, io.SEEK_END)
        raw.seek(max(0, size - LAST_BYTES))
        end = raw.read()
    last = end[end.rfind(b"\n") + 1 :]
    if not last.lstrip().startswith(b"{") or (len(last) == len(end) and size > len(end)) or _parsed(last) is not None or lines < 2:
        return None
    return Fault(f"is cut off: its last line is no whole JSON object: {_excerpt(last)}", "copy it again, or remove that line")


def _excerpt(line: bytes) -> str:
    text = line[:40].decode(errors="replace").strip()
    return f"{text!r}{'...' if len(line) > 40 else ''}"


def no_column(column: str, names: list[str], texts: list[str]) -> Fault:
    """Returns the fault of a file that lacks the column; `texts` are its columns of text."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return Fault(f"has no column {column}, it has {shown or 'none'}", nearest_column(column, texts))


def nearest_column(column: str, texts: list[str]) -> str:
    """Returns the setting for the column of text that is most likely meant."""
    likely = [name for name in ("text", "content", "raw_content", "document", "body", "input_ids") if name in texts]
    others = [name for name in [*likely, *texts] if name != column]
    return f"data.column={others[0]}" if others else "a file with a column of text"


# Folders and the hub.


def _look_at_shards(config: DataConfig) -> None:
    assert config.path is not None
    folder = Path(config.path).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        read_manifest(folder)
        return
    raise ValueError(f"data.path={config.path}: holds no shards of tokenyard prepare; nearest valid: {_nearest_shards(folder)}")


def _nearest_shards(folder: Path) -> str:
    places = [folder.parent, *(sorted(folder.iterdir()) if folder.is_dir() else [])]
    found = next((place for place in places if (place / MANIFEST_FILE).is_file()), None)
    if found is not None:
        return f"data.path={found}"
    kinds = {".parquet": "parquet", ".jsonl": "jsonl", ".gz": "jsonl", ".txt": "text"}
    files = [folder] if folder.is_file() else list(islice(_files_below(folder), 1000))
    kind = next((kinds[file.suffix] for file in files if file.suffix in kinds), None)
    return f"tokenyard prepare {folder}_shards data={kind} data.path={folder}" if kind else "tokenyard prepare FOLDER data=..."


def _files_below(folder: Path) -> Iterator[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _look_at_hub(config: DataConfig) -> None:
    """Asks for the data set once; what is in a cache is read without an answer."""
    from huggingface_hub import constants, hf_hub_url

    name, home = config.name or "", Path(constants.HF_HOME)
    caches = (
        Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}"),
        Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets", name.replace("/", "___")),
    )
    if Path(name).expanduser().exists() or any(cache.is_dir() for cache in caches):
        return
    answer = ask_hub(hf_hub_url(name, "README.md", repo_type="dataset"))
    if not answer.answered:
        where = f"data.name={name}: is neither a folder nor in {caches[0].parent}, and the Hugging Face hub does not answer"
        raise DataUnavailable(f"{where} ({answer.error}); nearest valid: a folder, or data=parquet data.path=FOLDER of a copy")
