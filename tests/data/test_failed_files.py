"""A file that cannot be read to its end: what it gave is used, where it failed is told, and the run does not go on in silence."""

import errno
import gzip
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import BYTES, config_of, names_in, on_ranks, opened, taken, write
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import BadData, DataUnavailable, EndOfData
from tokenyard.data.pretokenize import prepare_shards
from tokenyard.data.stream import files
from tokenyard.data.stream.http import RetryPolicy
from tokenyard.data.stream.shards import Shards, find_shards
from tokenyard.data.stream.tokenize import windows

TRIALS = 300


def damaged_shards(chance: random.Random, folder: Path) -> Shards:
    """Some shards of one format, each of them cut, spoiled or whole."""
    folder.mkdir()
    ending = chance.choice(["gz", "zst", "parquet"])
    for shard in range(chance.randint(1, 3)):
        lines = [chance.randbytes(chance.randint(4, 40)).hex() for _ in range(chance.randint(1, 400))]
        if ending == "parquet":
            sink = io.BytesIO()
            pq.write_table(pa.table({"text": lines}), sink, row_group_size=chance.choice([16, 100, 1000]), compression="none")
            packed = bytearray(sink.getvalue())
        else:
            raw = "\n".join(lines).encode()
            packed = bytearray(gzip.compress(raw) if ending == "gz" else pa.compress(raw, "zstd", asbytes=True))
        at = chance.randrange(len(packed) // 3, len(packed))
        match chance.choice(["cut", "spoiled", "whole"]):
            case "cut":
                del packed[at:]
            case "spoiled":
                packed[at : at + 20] = chance.randbytes(20)
        (folder / f"{shard}.{ending}").write_bytes(packed)
    paths = sorted(map(str, folder.iterdir()))
    return find_shards(paths, Corpus.parquet if ending == "parquet" else Corpus.lines, DataConfig(column="text"), RetryPolicy())


@pytest.mark.fault(32, f"{TRIALS} random shards, cut and spoiled, resumed at the edges of windows of many sizes: the same rows")
@pytest.mark.parametrize("seed", range(3))
def test_reading_goes_on_at_the_same_row_of_a_damaged_shard(tmp_path: Path, seed: int) -> None:
    chance, failed = random.Random(seed), 0
    for trial in range(TRIALS // 3):
        shards = damaged_shards(chance, tmp_path / str(trial))
        order, size = range(len(shards.names)), chance.choice([1, 2, 3, 7, 16, 50, 256])
        straight = list(windows(shards, order, (0, 0), size))
        # At the edge of a window: of as many rows as could be read there is another one with the same edge.
        for begin in chance.sample(range(len(straight)), min(3, len(straight))):
            after = straight[begin].after
            assert after is None or list(windows(shards, order, after, size)) == straight[begin + 1 :], (seed, trial, after)
        readable = max((number + 1 for window in straight for number in window.numbers), default=1)
        straight = list(windows(shards, order, (0, 0), readable))
        for begin, window in enumerate(straight[:-1]):
            assert list(windows(shards, order, window.after, readable)) == straight[begin + 1 :], (seed, trial, readable)
        failed += sum(window.failed is not None for window in straight)
    assert failed > TRIALS // 6


def no_column(path: Path) -> None:
    pq.write_table(pa.table({"other": ["x"]}), path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced(path: Path) -> None:
    """By a file of the same size; who has it open reads on in the one before."""
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.with_suffix(".other").write_bytes(content)
    path.with_suffix(".other").replace(path)


Harm = Callable[[Path], None]


@pytest.mark.fault(33, "cut, emptied, without the column: exit 65 with name, place and reason")
@pytest.mark.parametrize(
    ("kind", "name", "harm", "reason"),
    [
        (Corpus.jsonl, "3.jsonl.gz", cut, "after 0 rows: it is cut off: its compressed data have no end"),
        (Corpus.jsonl, "3.jsonl.gz", emptied, "after 0 rows: the file is empty"),
        (Corpus.parquet, "3.parquet", no_column, "after 0 rows: no column text, there are other"),
        (Corpus.parquet, "3.parquet", cut, "after 0 rows: its data are damaged or cut off"),
    ],
)
def test_one_file_that_fails_ends_the_run(tmp_path: Path, kind: Corpus, name: str, harm: Harm, reason: str) -> None:
    data = write(tmp_path / "rows", kind)
    harm(tmp_path / "rows" / name)
    batches = opened(data)
    with pytest.raises(BadData, match=rf"{kind.value}: {name} failed {reason}.*; data\.max_failed_files=0"):
        taken(batches, range(200))
    (found,) = batches.read_failures()
    assert (found.kind, found.source, found.file, found.row) == ("file_failed", kind.value, name, 0)


@pytest.mark.fault(33, "removed, cut or replaced during the run: the same")
@pytest.mark.parametrize(
    ("harm", "reason"),
    [(Path.unlink, "No such file"), (half, "file changed"), (emptied, "file changed"), (replaced, "file changed")],
)
@pytest.mark.parametrize("kind", [Corpus.jsonl, Corpus.parquet, Corpus.lines])
def test_a_file_that_is_gone_or_changed_in_the_run(tmp_path: Path, kind: Corpus, harm: Harm, reason: str) -> None:
    batches = opened(replace(write(tmp_path / "rows", kind), open_shards=1, window=4, patience_seconds=1.0))
    taken(batches, range(1))
    for path in (tmp_path / "rows").iterdir():
        harm(path)
    with pytest.raises(BadData, match=rf"failed after \d+ rows: .*{reason}"):
        taken(batches, range(1, 400))


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"row {row} {'x' * 100}\n" for row in range(20_000)))
    rows = find_shards([str(path)], Corpus.lines, DataConfig(), RetryPolicy()).rows(0, 0)
    read = [next(rows) for _ in range(100)]
    half(path)
    read += rows
    assert len(read) < 20_000 and "the file changed since the run began: it had" in str(read[-1])


@pytest.mark.fault(33, "as many as data.max_failed_files: each is told, the rest is read")
def test_files_that_may_fail(tmp_path: Path) -> None:
    data = replace(write(tmp_path / "rows", Corpus.parquet), max_failed_files=2, repeat=False)
    cut(tmp_path / "rows" / "0.parquet")
    no_column(tmp_path / "rows" / "2.parquet")
    batches, seen = opened(data, sequences=1), list[np.ndarray]()
    with pytest.raises(EndOfData):
        while True:
            seen.append(taken(batches, range(len(seen), len(seen) + 1)))
    counts = batches.metrics()
    assert (counts["data/parquet/failed_files"], counts["data/parquet/bad_rows"]) == (2, 0)
    assert counts["data/parquet/rows"] == 64 + 90 + 1 + 48 and len(set(names_in(np.concatenate(seen)))) > 180
    assert sorted(found.file for found in batches.read_failures()) == ["0.parquet", "2.parquet"]
    with pytest.raises(BadData, match=r"data\.max_failed_files=1"):
        taken(opened(replace(data, max_failed_files=1)), range(200))
    assert taken(opened(replace(data, repeat=True)), range(300)).shape[0] == 300  # an epoch's failures are no other epoch's


def stale(monkeypatch: pytest.MonkeyPatch, code: int, times: int) -> None:
    """So often a local file that is read fails."""
    left, right = [times], files.open_raw

    class Failing(io.BufferedReader):
        def _fail(self) -> None:
            if left[0] and self.tell() > 100:
                left[0] -= 1
                raise OSError(code, "Stale file handle")

        def readline(self, size: int | None = -1, /) -> bytes:
            self._fail()
            return super().readline(size)

        def __next__(self) -> bytes:
            self._fail()
            return super().__next__()

    class Once:
        def __init__(self, *arguments: Any) -> None:
            self._context = right(*arguments)

        def __enter__(self) -> Any:
            return Failing(io.FileIO(self._context.__enter__().fileno(), closefd=False))

        def __exit__(self, *error: Any) -> Any:
            return self._context.__exit__(*error)

    monkeypatch.setattr(files, "open_raw", Once)


@pytest.mark.fault(33, "ESTALE, EIO: tried again at the same row; after data.patience_seconds exit 75")
@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_errors_that_may_pass_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    data = write(tmp_path / "rows", Corpus.lines)
    straight = taken(opened(data), range(60))
    batches = opened(replace(data, patience_seconds=5.0))
    stale(monkeypatch, code, 1)
    assert np.array_equal(taken(batches, range(60)), straight) and not batches.read_failures()
    batches = opened(replace(data, patience_seconds=0.3))
    stale(monkeypatch, code, 1000)
    with pytest.raises(DataUnavailable, match=r"\d\.txt did not answer for .*Stale file handle"):
        taken(batches, range(60))


@pytest.mark.fault(33, "a file that one rank alone cannot read: all ranks end alike")
@pytest.mark.parametrize("size", [2, 5])
def test_what_one_rank_cannot_read_ends_all(tmp_path: Path, size: int) -> None:
    """With 5 ranks some share the windows of a slot, and the others read on."""
    data = write(tmp_path / "rows", Corpus.lines)
    told: dict[int, str] = {}

    def work(world: Any) -> np.ndarray:
        batches = opened(data, world)
        if world.rank == 1:
            shards: Any = batches.mixture.sources[0]._shards  # pyright: ignore
            shards._paths = [path + ".gone" for path in shards._paths]
        with pytest.raises(BadData) as error:
            taken(batches, range(60))
        told[world.rank] = str(error.value)
        return np.empty(0)

    on_ranks(size, work)
    assert len(told) == size and len(set(told.values())) == 1 and "No such file" in told[0]


def test_prepare_refuses_a_file_that_fails(tmp_path: Path) -> None:
    data = write(tmp_path / "rows", Corpus.jsonl)
    half(tmp_path / "rows" / "3.jsonl.gz")
    with pytest.raises(BadData, match=r"3\.jsonl\.gz failed after \d+ rows: .*; mend it or leave it out"):
        prepare_shards(data, BYTES, tmp_path / "out", 1, lambda *_: None)


def lines_config(folder: Path, rows: list[str]) -> DataConfig:
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(rows))
    return config_of(folder, Corpus.jsonl, validation_fraction=0.2)


def good(count: int) -> list[str]:
    return [json.dumps({"text": f"<0.{row}> words"}) for row in range(count)]


@pytest.mark.fault(34, "ids beyond int64, dates beyond the year 9999: bad rows with their place")
@pytest.mark.parametrize("number", ["9223372036854775808", "-99999999999999999999", "1" * 4000])
def test_ids_beyond_int64_are_bad_rows(tmp_path: Path, number: str) -> None:
    rows = good(60)
    rows.insert(7, f'{{"text": [1, {number}]}}')
    batches = opened(lines_config(tmp_path / "rows", rows))
    assert taken(batches, range(30)).shape[0] == 30
    assert {str(found) for found in batches.read_failures()} == {f"jsonl: a.jsonl row 7: id {number[:24]} is no int64"}


@pytest.mark.fault(34)
@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.date64(), pa.duration("s"), pa.timestamp("us", "Nowhere/City")])
@pytest.mark.parametrize("listed", [False, True])
def test_dates_that_python_does_not_know_are_bad_rows(tmp_path: Path, kind: pa.DataType, listed: bool) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    values = pa.array([2**61, 0, None], pa.int64()).cast(kind, safe=False)
    column = pa.array([[value] for value in values], pa.list_(kind)) if listed else values
    pq.write_table(pa.table({"text": [f"<0.{row}> words" for row in range(100)]}), folder / "0.parquet")
    pq.write_table(pa.table({"text": column}), folder / "1.parquet")
    batches = opened(config_of(folder, Corpus.parquet, validation_fraction=0.2, max_bad_fraction=0.2))
    assert taken(batches, range(30)).shape[0] == 30
    found = batches.read_failures()[:3]
    assert [(each.kind, each.file, each.row) for each in found] == [("bad_row", "1.parquet", row) for row in range(3)]


@pytest.mark.fault(34, "whatever else stops one rank's reading: all ranks end alike")
def test_an_error_that_nobody_expects_ends_all_ranks(tmp_path: Path) -> None:
    data = write(tmp_path / "rows", Corpus.lines)
    told: list[str] = []

    def work(world: Any) -> np.ndarray:
        batches = opened(data, world)
        if world.rank == 1:
            shards: Any = batches.mixture.sources[0]._shards  # pyright: ignore
            shards.rows = lambda shard, first: iter([int])
        with pytest.raises(BadData) as error:
            taken(batches, range(60))
        told.append(str(error.value))
        return np.empty(0)

    on_ranks(2, work)
    assert len(told) == 2 and len(set(told)) == 1 and told[0].startswith("rank 1 cannot read its rows: TypeError")
