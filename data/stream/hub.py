"""Data sets of the Hugging Face hub, through `datasets`: which files a split has, and formats that only `datasets` reads."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, final

import xxhash

from ..config import Corpus, DataConfig
from .remote import Patience, may_pass, patiently
from .shards import BATCH, Failed, Row, Shards, column_rows, file_shards, in_words, no_column


def open_hub(config: DataConfig, patience: Patience) -> Shards:
    """The split of a data set by name, or of a folder that is laid out as one.

    Files of parquet, of JSON lines and of text are read by our own readers, which lose no row to a bad neighbour and begin at any
    row; everything else by an IterableDataset. ValueError of one line if the hub does not know it.
    """
    import datasets

    name = str(Path(config.name or "").expanduser()) if Path(config.name or "").expanduser().exists() else config.name or ""
    try:
        builder = datasets.load_dataset_builder(name, config.subset, revision=config.revision)
        files = list((builder.config.data_files or {}).get(config.split, []))
        splits = list(builder.config.data_files or builder.info.splits or {})
    except Exception as error:  # whatever the hub, the network and the builders raise
        raise ValueError(f"data.name={config.name} cannot be opened: {' '.join(str(error).split())}") from error
    if config.split not in splits and splits:
        raise ValueError(f"data.split={config.split} must be one of {', '.join(map(str, splits))}, the splits of {config.name}")
    kind = _kind(builder, files)
    if kind is not None:
        return file_shards(files, kind, config.column, patience)
    return HubShards(config, name, files, patience)


def open_remote(path: str) -> IO[bytes]:
    """A file behind any protocol that `datasets` knows."""
    from datasets.utils.file_utils import xopen

    file: Any = xopen(path, "rb")
    return file


@final
class HubShards(Shards):
    """An IterableDataset, shard by shard. `skip` finds a row again exactly; its shuffle buffer, which does not, is not used."""

    def __init__(self, config: DataConfig, name: str, files: list[str], patience: Patience) -> None:
        import datasets

        self._data: Any = datasets.load_dataset(name, config.subset, split=config.split, revision=config.revision, streaming=True)
        count = self._data.num_shards
        self.names = [f"{config.name}/{config.split}#{index}" for index in range(count)]
        key = (config.name, config.subset, config.split, config.revision, config.column, files, count)
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr(key).encode())
        self._column, self._patience = config.column, patience

    def rows(self, shard: int, first: int) -> Iterator[Row | Failed]:
        return patiently(lambda row: self._read(shard, row), first, self.names[shard], self._patience)

    def _read(self, shard: int, first: int) -> Iterator[Row | Failed]:
        part = self._data.shard(len(self.names), shard) if len(self.names) > 1 else self._data
        above = first % BATCH  # batches begin at the same rows wherever reading begins
        try:
            for table in part.skip(first - above).with_format("arrow").iter(batch_size=BATCH):
                if self._column not in table.column_names:
                    yield no_column(self._column, table.column_names)
                    return
                yield from column_rows(table.column(self._column).combine_chunks())[above:]
                above = 0
        except Exception as error:  # whatever a builder raises
            if may_pass(error):
                raise
            yield Failed(in_words(error))


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
