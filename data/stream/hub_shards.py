"""Opens the shards of a source: files, or a data set of the Hugging Face hub.

Of such a set `datasets` finds the files of a split, and reads formats that the readers of shards.py do not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import xxhash

from ..checks import refuse_outside
from ..config import Corpus, DataConfig
from .files import find_files
from .http import RetryPolicy, is_transient, retry_call
from .shards import BATCH_ROWS, FailedShard, Row, ShardFiles, Shards, column_rows, error_text, file_shards, find_shards, no_column


def open_shards(config: DataConfig, retry: RetryPolicy, files: ShardFiles | None = None) -> Shards:
    """Returns the shards of a streamed source; of these `files`, if another process has found them.

    Raises ValueError, one line, if there are none.
    """
    if files is not None:
        return file_shards(files, config, retry)
    if config.corpus is Corpus.hf:
        return open_hub(config, retry)
    assert config.path is not None
    return find_shards(find_files(config.path, config.corpus.value), config.corpus, config, retry)


def open_hub(config: DataConfig, retry: RetryPolicy) -> Shards:
    """Returns the split of a data set on the hub, or of a folder with the layout of one.

    Files of parquet, JSON lines and text are read by the readers above, which lose no row to a bad neighbour and begin at any row;
    everything else by an IterableDataset. Raises ValueError, one line, if the hub does not know it, or if it names files of others.
    """
    name = str(Path(config.name or "").expanduser()) if Path(config.name or "").expanduser().exists() else config.name or ""
    builder = retry_call(lambda: _builder(config, name), f"data.name={config.name}", retry)
    every = builder.config.data_files or {}
    refuse_foreign_files(name, [file for files in every.values() for file in files])
    files, splits = list(every.get(config.split, [])), list(every or builder.info.splits or {})
    if config.split not in splits and splits:
        raise ValueError(f"data.split={config.split} must be one of {', '.join(map(str, splits))}, the splits of {config.name}")
    kind = _kind(builder, files)
    if kind is not None:
        return find_shards(files, kind, config, retry)
    return HubShards(config, name, files, retry)


def _builder(config: DataConfig, name: str) -> Any:
    """Returns the builder of `datasets`. Raises ValueError for an unknown data set, a transient error without the hub."""
    import datasets
    from huggingface_hub.errors import OfflineModeIsEnabled

    refuse_outside_card(name)
    try:
        return datasets.load_dataset_builder(name, config.subset, revision=config.revision)
    except Exception as error:  # the hub, the network and the builders raise many types
        if is_transient(error) and not isinstance(error, OfflineModeIsEnabled):
            raise
        raise ValueError(f"data.name={config.name} cannot be opened: {error_text(error)}") from error


def refuse_outside_card(name: str) -> None:
    """Raises ValueError if the card of the folder `name` names a path or URL outside of it, before `datasets` follows it."""
    import yaml
    from huggingface_hub import DatasetCard

    card, more = Path(name, "README.md"), Path(name, ".huggingface.yaml")
    found: list[Any] = []
    try:
        found += [DatasetCard(card.read_text(), ignore_metadata_errors=True).data.to_dict()] if card.is_file() else []
        found += [yaml.safe_load(more.read_text())] if more.is_file() else []
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"data.name={name}: its card cannot be read: {error_text(error)}") from None
    for place in _card_paths(found):
        if "://" in place or "::" in place or place.startswith(("/", "~")) or ".." in place.replace("\\", "/").split("/"):
            raise ValueError(f"data.name={name} leads out of its folder: its card names {place}")


def _card_paths(found: list[Any]) -> Iterator[str]:
    """Yields all strings under the keys data_files and data_dir.

    Visits each object once: YAML aliases may repeat one many times.
    """
    left, seen = [(each, False) for each in found], set[tuple[int, bool]]()
    while left:
        thing, named = left.pop()
        if isinstance(thing, str) and named:
            yield thing
        if not isinstance(thing, dict | list) or (id(thing), named) in seen:
            continue
        seen.add((id(thing), named))
        if isinstance(thing, dict):
            left += [(value, named or key in ("data_files", "data_dir")) for key, value in thing.items()]
        else:
            left += [(value, named) for value in thing]


def refuse_foreign_files(name: str, files: list[str]) -> None:
    """Raises ValueError for a file that does not belong to the data set `name`."""
    if Path(name).exists():
        return refuse_outside(Path(name), files, "data.name")
    for file in files:
        if not file.startswith(f"hf://datasets/{name}@") or ".." in file.split("/"):
            raise ValueError(f"data.name={name} leads out of its folder: {file}; read that by a data.path of its own")
    return None


@final
class HubShards(Shards):
    """The shards of an IterableDataset. Its `skip` finds a row again; its shuffle buffer, which cannot be resumed, is not used."""

    def __init__(self, config: DataConfig, name: str, files: list[str], retry: RetryPolicy) -> None:
        import datasets

        self._data: Any = datasets.load_dataset(name, config.subset, split=config.split, revision=config.revision, streaming=True)
        count = self._data.num_shards
        self.names = [f"{config.name}/{config.split}#{index}" for index in range(count)]
        key = (config.name, config.subset, config.split, config.revision, config.column, files, count)
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(key).encode())
        self._column, self._retry = config.column, retry

    def _read(self, shard: int, first: int) -> Iterator[Row | FailedShard]:
        part = self._data.shard(len(self.names), shard) if len(self.names) > 1 else self._data
        above = first % BATCH_ROWS  # batches begin at the same rows wherever reading begins
        try:
            for table in part.skip(first - above).with_format("arrow").iter(batch_size=BATCH_ROWS):
                if self._column not in table.column_names:
                    yield no_column(self._column, table.column_names)
                    return
                yield from column_rows(table.column(self._column).combine_chunks())[above:]
                above = 0
        except Exception as error:  # builders raise many types
            if is_transient(error):
                raise
            yield FailedShard(error_text(error))


def _kind(builder: Any, files: list[str]) -> Corpus | None:
    match builder.name if files else "":
        case "parquet":
            return Corpus.parquet
        case "json" if all(".json" in file.rpartition("/")[2] and not file.endswith(".json") for file in files):
            return Corpus.jsonl  # plain .json may be one array
        case "text":
            return Corpus.lines
        case _:
            return None
