"""What cannot be read before the run begins, of held-out text and of the sample for a tokenizer, is told like in training."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streaming import BYTES, LENGTH, config_of, document, opened, taken, write
from tokenyard.data.build import open_data
from tokenyard.data.config import Corpus, TokenizerConfig, TokenizerKind
from tokenyard.data.errors import BadData, EndOfData
from tokenyard.data.stream.mixture import StreamBatches
from tokenyard.launch.main import main

Harm = Callable[[Path], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 20])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def spoiled(path: Path) -> None:
    path.write_bytes(b"\x00" * 20 + path.read_bytes()[20:])


@pytest.mark.fault(33, "damaged from its first byte, at the start: the same")
@pytest.mark.parametrize("ending", ["gz", "zst", "parquet"])
@pytest.mark.parametrize("harm", [spoiled, cut, emptied])
@pytest.mark.parametrize("tokenizer", [BYTES, TokenizerConfig(kind=TokenizerKind.sentencepiece, pieces=300)])
def test_nothing_but_a_file_that_fails_from_its_first_byte(
    tmp_path: Path, ending: str, harm: Harm, tokenizer: TokenizerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is held out, and what a tokenizer is trained on, is read first: not validation_fraction is at fault."""
    (tmp_path / "rows").mkdir()
    name = "a.parquet" if ending == "parquet" else f"a.txt.{ending}"
    path, texts = tmp_path / "rows" / name, [document(0, row) for row in range(300)]
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    else:
        raw = "\n".join(texts).encode()
        path.write_bytes(gzip.compress(raw) if ending == "gz" else pa.compress(raw, "zstd", asbytes=True))
    harm(path)
    kind = Corpus.parquet if ending == "parquet" else Corpus.lines
    config = config_of(tmp_path / "rows", kind, validation_fraction=0.2)
    with pytest.raises(BadData, match=rf"^{kind.value}: {name} failed after 0 rows: \w.*; no document of source") as error:
        open_data(config, tokenizer, LENGTH, 1, 4, None, 1)
    assert "\n" not in str(error.value) and error.value.exit_code == 65
    words = [f"data={kind.value}", f"data.path={tmp_path}/rows", f"data.cache={tmp_path}/cache", "tokenizer=bytes"]
    assert main(["data", "inspect", *words, "sequence_length=32"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.fault(18, "met while held-out text is collected: told once, as in training")
def test_what_cannot_be_read_of_held_out_text_is_told_once(tmp_path: Path) -> None:
    data = replace(write(tmp_path / "rows", Corpus.lines), validation_fraction=0.3, max_failed_files=1)
    path = tmp_path / "rows" / "0.txt"
    path.write_bytes(b"\xff\n\n" + path.read_bytes())
    for row in range(20):  # some of them among those held out, which are bad rows too
        path.write_bytes(path.read_bytes() + b"\n\xfe%d" % row)
    emptied(tmp_path / "rows" / "1.txt.gz")
    data = replace(data, max_bad_fraction=0.5, repeat=False)
    first = open_data(data, BYTES, LENGTH, 1, 4, None, 256).train
    assert isinstance(first, StreamBatches)
    found = first.read_failures()
    assert len(found) == 23 and sorted({each.kind for each in found}) == ["bad_row", "file_failed"]
    assert (found[0].file, found[0].row, found[0].kind) == ("1.txt.gz", 0, "file_failed") and found[1].number == 1
    to_the_end(first)
    assert first.read_failures() == [] and first.metrics()["data/lines/bad_rows"] == 22
    again = open_data(data, BYTES, LENGTH, 1, 4, None, 256).train  # held out text is in the cache, training meets them
    assert isinstance(again, StreamBatches) and again.read_failures() == []
    to_the_end(again)
    assert {each[1:5] for each in again.read_failures()} == {each[1:5] for each in found}


def test_nothing_but_bad_rows_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}\n" * 50)
    config = config_of(tmp_path / "rows", Corpus.jsonl, validation_fraction=0.2)
    with pytest.raises(
        BadData, match=r"jsonl: 50 bad rows of 50 are more than data\.max_bad_fraction.*a\.jsonl row 0: no key text; "
    ):
        opened(config)


def to_the_end(batches: StreamBatches) -> None:
    with pytest.raises(EndOfData):
        taken(batches, range(10_000))
