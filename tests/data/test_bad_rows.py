"""What is no document is skipped, counted and named; too much of it stops the run."""

import bz2
import gzip
import itertools
import json
import lzma
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import config_of, names_in, on_ranks, opened, taken
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import BadData, EndOfData
from tokenyard.data.stream.documents import TokenizingRanks
from tokenyard.data.stream.http import RetryPolicy
from tokenyard.data.stream.shards import BadRow, FailedShard, find_shards


def good(count: int) -> list[bytes]:
    return [json.dumps({"text": f"<0.{row}> words"}).encode() for row in range(count)]


def read_all(config: DataConfig) -> tuple[set[str], dict[str, float], list[str]]:
    """An epoch: the documents that were seen, what was counted, what was bad."""
    batches, seen = opened(replace(config, repeat=False, validation_fraction=0.2), sequences=1), []
    with pytest.raises(EndOfData):
        while True:
            seen.append(taken(batches, range(len(seen), len(seen) + 1)))
    counts = {name.rpartition("/")[2]: count for name, count in batches.metrics().items()}
    return set(names_in(np.concatenate(seen))), counts, [str(found) for found in batches.read_failures()]


@pytest.mark.fault(18, "each bad row named with file and row, none dropped in silence")
def test_bad_lines_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    bad = [
        b'{"text": "caf\xe9"}',
        b'{"text": null}',
        b'{"text": "  "}',
        b'{"other": "x"}',
        b'{"text": 5}',
        b"{not json",
        b'{"text": [1, 2, 999]}',
        json.dumps({"text": "y" * 5000}).encode(),
    ]
    lines = good(100)
    for place, line in enumerate(bad):
        lines.insert(10 * place + 5, line)
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    seen, counts, listed = read_all(config_of(folder, Corpus.jsonl, longest_row=4000))
    assert 97 <= len(seen) + counts["held_out"] <= 100 and counts["documents"] + counts["held_out"] == 100
    assert (counts["bad_rows"], counts["rows"]) == (8, 108)
    text = "\n".join(listed)
    reasons = ("not UTF-8", "null", "empty", "no key text", "is int", "no JSON", "id 999", "5000 bytes")
    for place, reason in enumerate(reasons):
        assert f"a.jsonl row {10 * place + 5}: " in text and reason in text, (place, reason, text)


@pytest.mark.fault(18, "named alike on every rank")
@pytest.mark.parametrize("world", [2, 5])
def test_all_ranks_know_which_rows_are_bad(tmp_path: Path, world: int) -> None:
    """And why, though each row is read by one of them; a reason of any length, in any script."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for shard in range(3):
        lines = good(40)
        for place in range(0, 40, 7):
            lines[place] = json.dumps({"text": [1, -place - 1]}).encode() if place % 2 else b'{"text": null}'
        (folder / f"{shard}.jsonl").write_bytes(b"\n".join(lines))
    config = config_of(folder, Corpus.jsonl, max_bad_fraction=0.5, validation_fraction=0.2)
    found: dict[int, list[str]] = {}

    def work(ranks: TokenizingRanks) -> np.ndarray:
        batches = opened(config, ranks)
        ids = taken(batches, range(20))
        found[ranks.rank] = [str(each) for each in batches.read_failures()]
        return ids

    opened(config)  # reads the validation documents, and reports what is bad on the way
    alone = opened(config)
    straight = taken(alone, range(20))
    listed = [str(each) for each in alone.read_failures()]
    assert all(np.array_equal(ids, straight) for ids in on_ranks(world, work)) and len(listed) >= 18
    assert all(found[rank] == listed for rank in range(world)) and any("id -8" in text for text in listed)


@pytest.mark.fault(33, "ranks that read different rows of one window end alike")
def test_ranks_that_do_not_read_the_same_rows(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(b"\n".join(good(60)))
    config, told = config_of(folder, Corpus.jsonl), []

    def work(ranks: TokenizingRanks) -> np.ndarray:
        batches = opened(config, ranks)
        if ranks.rank == 2:
            shards: Any = batches.mixture.sources[0]._shards  # pyright: ignore
            whole = shards.rows
            shards.rows = lambda shard, first: itertools.chain(itertools.islice(whole(shard, first), 11), [FailedShard("cut")])
        with pytest.raises(BadData, match=r"ranks that share a window do not read the same rows \(0.jsonl row 11: cut\)"):
            taken(batches, range(20))
        told.append(ranks.rank)
        return np.empty(0)

    on_ranks(3, work)
    assert sorted(told) == [0, 1, 2]


@pytest.mark.fault(18)
def test_too_many_bad_rows_stop_with_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\n".join([*good(100), *[b"broken"] * 11]))
    with pytest.raises(BadData, match=r"11 bad rows of \d+ are more than data\.max_bad_fraction=0\.001.*a\.jsonl row 100: no JSON"):
        taken(opened(config_of(folder, Corpus.jsonl)), range(30))
    assert taken(opened(config_of(folder, Corpus.jsonl, max_bad_fraction=0.5)), range(30)).shape[0] == 30


@pytest.mark.fault(18)
def test_one_bad_string_in_parquet_takes_no_other_row_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [f"<0.{row}> words".encode() for row in range(50)]
    texts[20] = b"\xff\xfe"
    values = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), folder / "0.parquet")
    seen, counts, listed = read_all(config_of(folder, Corpus.parquet))
    assert 46 <= len(seen) + counts["held_out"] <= 49 and (counts["documents"] + counts["held_out"], counts["bad_rows"]) == (49, 1)
    assert listed == ["parquet: 0.parquet row 20: not UTF-8"]


@pytest.mark.fault(18)
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_truncated_file_gives_its_rows_and_says_so(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    chance = np.random.Generator(np.random.Philox(1))
    lines = [json.dumps({"text": f"<0.{row}> {chance.bytes(200).hex()}"}).encode() for row in range(1200)]
    raw = b"\n".join(lines)
    packed = gzip.compress(raw) if ending == "gz" else pa.compress(raw, "zstd", asbytes=True)
    (folder / f"a.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    seen, counts, listed = read_all(config_of(folder, Corpus.jsonl, max_failed_files=1))
    assert 100 < counts["rows"] < 900 and (counts["bad_rows"], counts["failed_files"]) == (0, 1)
    assert len(seen) + counts["held_out"] >= counts["rows"] - 2
    (line,) = listed
    assert line.startswith(f"jsonl: a.jsonl.{ending} failed after {counts['rows']} rows: ")


def bomb(path: Path, size: int, before: bytes, after: bytes) -> None:
    """A compressed file whose second line has `size` bytes."""
    opener: Any = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(path.suffix)
    sink = pa.CompressedOutputStream(str(path), "zstd") if path.suffix == ".zst" else opener(path, "wb")
    with sink as file:
        file.write(before)
        for _ in range(size >> 24):
            file.write(b"x" * (1 << 24))
        file.write(after)


MEASURED = """
import sys, time
from tokenyard.launch.main import main
begin = time.process_time()
code = main(sys.argv[1:])
peak = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]  # that of getrusage is also the parent's
print("MEASURED", code, int(peak) // 1024, round(time.process_time() - begin, 2))
"""


@pytest.mark.parametrize(("verb", "ending"), [("data inspect", "jsonl.gz"), ("train", "txt.zst")])
def test_a_row_of_gigabytes(tmp_path: Path, ending: str, verb: str, record_property: Any) -> None:
    """No more of it is held or unpacked than rows may have: 65, in one line, soon."""
    rows = b"".join(json.dumps({"text": f"<0.{row}> words"}).encode() + b"\n" for row in range(200))
    (tmp_path / "rows").mkdir()
    bomb(tmp_path / "rows" / f"a.{ending}", 1 << 30 if ending == "txt.zst" else 1 << 29, rows, b"\n" + rows)
    assert (tmp_path / "rows" / f"a.{ending}").stat().st_size < 5 << 20
    kind = {"jsonl": "jsonl", "txt": "lines"}[ending.partition(".")[0]]
    words = [f"data={kind}", f"data.path={tmp_path}/rows", f"data.cache={tmp_path}/cache", "tokenizer=bytes", "sequence_length=32"]
    words += [f"run.dir={tmp_path}/run", "tracker=jsonl"] if verb == "train" else []
    ended = subprocess.run([sys.executable, "-c", MEASURED, *verb.split(), *words], capture_output=True, text=True, timeout=120)
    assert "MEASURED" in ended.stdout, ended.stderr
    code, megabytes, seconds = ended.stdout.rpartition("MEASURED")[2].split()
    record_property("measured", f"{verb} of {ending}: {megabytes} MB, {seconds} s")
    assert int(code) == 65 and "a row of more than" in ended.stderr and "Traceback" not in ended.stderr
    # A run on short rows takes up to 600 MB, 40 of which are triton's, which torch imports if it is there.
    assert int(megabytes) < {"data inspect": 500, "train": 680}[verb] and float(seconds) < 15


def test_lines_that_are_too_long_are_bad_rows_and_the_next_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + b"x" * 9_000_000 + b'\n{"text": "two"}\n' + b"x" * 9_000_000)
    read = list(
        find_shards(
            [str(tmp_path / "a.jsonl")], Corpus.jsonl, DataConfig(column="text", longest_row=1_000_000), RetryPolicy()
        ).rows(0, 0)
    )
    long = BadRow("9000001 bytes, more than data.longest_row=1000000"), BadRow("9000000 bytes, more than data.longest_row=1000000")
    assert read == [b"one", long[0], b"two", long[1]]
    assert (
        list(
            find_shards(
                [str(tmp_path / "a.jsonl")], Corpus.jsonl, DataConfig(column="text", longest_row=1_000_000), RetryPolicy()
            ).rows(0, 2)
        )
        == read[2:]
    )


def test_a_line_of_escapes_is_no_longer_than_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\x01" * 1_000_000, "n": "x" * 1_000_000}) + "\n")
    assert list(
        find_shards(
            [str(tmp_path / "a.jsonl")], Corpus.jsonl, DataConfig(column="text", longest_row=1_000_000), RetryPolicy()
        ).rows(0, 0)
    ) == [b"\x01" * 1_000_000]


def test_a_line_as_long_as_what_is_read_at_once(tmp_path: Path) -> None:
    """Its end falls on the end of a part."""
    most = 10 + (1 << 20)
    for size in (most - 2, most - 1, most, most + 1, most + (1 << 20) - 1, most + (1 << 20)):
        (tmp_path / "a.txt").write_bytes(b"x" * size + b"\nnext\n")
        first, *rest = find_shards([str(tmp_path / "a.txt")], Corpus.lines, DataConfig(longest_row=10), RetryPolicy()).rows(0, 0)
        assert rest == [b"next"] and (first == b"x" * size or first == BadRow(f"{size + 1} bytes, more than data.longest_row=10"))
