"""What is no document is skipped, counted and named; too much of it stops the run."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import config_of, names_in, opened, taken
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import BadData, EndOfData


def good(count: int) -> list[bytes]:
    return [json.dumps({"text": f"<0.{row}> words"}).encode() for row in range(count)]


def read_all(config: DataConfig) -> tuple[set[str], dict[str, float], list[str]]:
    """An epoch: the documents that were seen, what was counted, what was bad."""
    batches, seen = opened(replace(config, repeat=False, validation_fraction=0.2), sequences=1), []
    with pytest.raises(EndOfData):
        while True:
            seen.append(taken(batches, range(len(seen), len(seen) + 1)))
    counts = {name.rpartition("/")[2]: count for name, count in batches.counts().items()}
    return set(names_in(np.concatenate(seen))), counts, batches.bad_rows()


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
