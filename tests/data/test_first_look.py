"""What is refused before anything starts: each file that is not what it claims to be, in one line that names the first cause."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import DataUnavailable
from tokenyard.data.first_look import look_at_data
from tokenyard.launch.main import main

TEXTS = [f"Document {row} has some words." for row in range(20)]
RECORDS = [{"text": text, "id": row} for row, text in enumerate(TEXTS)]
LINES = "".join(f"{json.dumps(record)}\n" for record in RECORDS).encode()


def parquet(**columns: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


GOOD = parquet(text=TEXTS, id=list(range(20)))
NULLS = parquet(text=pa.array([None] * 20, pa.string()), other=TEXTS)
AGAIN = "copy it again, or leave it out"
ANY = "a file of text, JSON lines or parquet"
CUT = gzip.compress(LINES)[:-9]

REFUSED: list[tuple[str, str, bytes, str]] = [
    ("parquet", "a.parquet", b"", "is empty; nearest valid: another file, or leave it out"),
    ("parquet", "a.parquet", LINES, "is no parquet file, it holds JSON; nearest valid: data=jsonl"),
    ("parquet", "a.parquet", b"\x93\x00" * 500, f"is no parquet file, it holds binary data; nearest valid: {ANY}"),
    (
        "parquet",
        "a.parquet",
        GOOD[:-30],
        f"is a parquet file that is cut off: it does not end with its footer; nearest valid: {AGAIN}",
    ),
    (
        "parquet",
        "a.parquet",
        GOOD[:-60] + b"\xff" * 52 + GOOD[-8:],
        f"is a damaged parquet file: its footer cannot be read; nearest valid: {AGAIN}",
    ),
    ("parquet", "a.parquet", parquet(text=pa.array([], pa.string())), "has no rows; nearest valid: another file, or leave it out"),
    (
        "parquet",
        "a.parquet",
        parquet(id=[1, 2], content=["one", "two"]),
        "has no column text, it has id, content; nearest valid: data.column=content",
    ),
    (
        "parquet",
        "a.parquet",
        parquet(text=[1, 2], body=["one", "two"]),
        "column text is int64, not text or a list of token ids; nearest valid: data.column=body",
    ),
    ("parquet", "a.parquet", NULLS, "column text is null in all 20 rows; nearest valid: data.column=other"),
    ("jsonl", "a.jsonl", b"", "is empty; nearest valid: another file, or leave it out"),
    ("jsonl", "a.jsonl", GOOD, "holds parquet, and UTF-8 text is read; nearest valid: data=parquet"),
    ("jsonl", "a.jsonl", b"\x93\x00" * 500, f"holds binary data, and UTF-8 text is read; nearest valid: {ANY}"),
    (
        "jsonl",
        "a.jsonl",
        LINES.decode().encode("utf-16"),
        "holds UTF-16 text, and UTF-8 text is read; nearest valid: iconv -f UTF-16 -t UTF-8",
    ),
    ("jsonl", "a.jsonl", gzip.compress(LINES), "is gzip, which its name does not say; nearest valid: rename it a.jsonl.gz"),
    ("jsonl", "a.jsonl.gz", LINES, "its name says .gz, and it is JSON; nearest valid: rename it a.jsonl"),
    ("jsonl", "a.jsonl.gz", bz2.compress(LINES), "its name says .gz, and it is bzip2; nearest valid: rename it a.jsonl.bz2"),
    ("jsonl", "a.jsonl.gz", GOOD, "its name says .gz, and it is parquet; nearest valid: rename it a.jsonl; or data=parquet"),
    ("jsonl", "a.jsonl.gz", CUT, f"is gzip that is cut off: it has no end; nearest valid: {AGAIN}"),
    ("jsonl", "a.jsonl.gz", CUT[:30] + b"\0" * 30 + CUT[60:], f"is gzip that is damaged; nearest valid: {AGAIN}"),
    (
        "jsonl",
        "a.jsonl.gz",
        gzip.compress(b""),
        "holds nothing when it is unpacked; nearest valid: another file, or leave it out",
    ),
    (
        "jsonl",
        "a.jsonl",
        json.dumps(RECORDS).encode(),
        "is one JSON array, and an object a line is read; nearest valid: jq -c '.[]' FILE > FILE.jsonl",
    ),
    (
        "jsonl",
        "a.jsonl",
        json.dumps(RECORDS[0], indent=1).encode(),
        "line 1 is no whole JSON object: one may be spread over several lines; nearest valid: jq -c . FILE > FILE.jsonl",
    ),
    (
        "jsonl",
        "a.jsonl",
        b"text,id\none,1\n",
        "line 1 is no JSON object: 'text,id'; nearest valid: data=text, which takes any text, or data=lines",
    ),
    (
        "jsonl",
        "a.jsonl",
        LINES.replace(b'"text"', b'"content"'),
        "has no column text, it has content, id; nearest valid: data.column=content",
    ),
    (
        "jsonl",
        "a.jsonl",
        b'{"text": 1, "body": "one"}\n' * 3,
        "line 1: text is int, not text, and so in all 3 lines that were read; nearest valid: data.column=body",
    ),
    (
        "jsonl",
        "a.jsonl",
        b'{"text": null}\n' * 3,
        "line 1: text is null, and so in all 3 lines that were read; nearest valid: a file with a column of text",
    ),
    (
        "jsonl",
        "a.jsonl",
        LINES[:-20],
        'is cut off: its last line is no whole JSON object: \'{"text": "Document 19 has some\'; '
        "nearest valid: copy it again, or remove that line",
    ),
    ("lines", "a.txt", GOOD, "holds parquet, and UTF-8 text is read; nearest valid: data=parquet"),
    ("text", "a.txt", b"", "is empty; nearest valid: another file, or leave it out"),
    ("text", "a.txt", b"\x93\x00" * 500, f"holds binary data, and UTF-8 text is read; nearest valid: {ANY}"),
]


@pytest.mark.parametrize(("kind", "name", "held", "said"), REFUSED)
def test_a_file_that_is_not_what_it_claims_to_be(tmp_path: Path, kind: str, name: str, held: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(held)
    with pytest.raises(ValueError) as error:
        look_at_data(DataConfig(corpus=Corpus[kind], path=str(tmp_path / name)))
    assert str(error.value) == f"data.path={tmp_path / name}: {said}"


@pytest.mark.parametrize(
    ("kind", "name", "held"),
    [
        ("parquet", "a.parquet", GOOD),
        ("parquet", "a.parquet", parquet(text=[[1, 2], [3]])),
        ("parquet", "a.parquet", parquet(text=pa.array(TEXTS).dictionary_encode())),
        ("parquet", "a.parquet", parquet(text=[None, *TEXTS])),
        ("jsonl", "a.jsonl", LINES),
        ("jsonl", "a.jsonl", LINES.rstrip()),
        ("jsonl", "a.jsonl", b"\n" + LINES),
        ("jsonl", "a.jsonl", b'{"text": "\xff\xfe"}\n' + LINES),
        ("jsonl", "a.jsonl", b'{"id": 1}\nno JSON\n' + LINES),
        ("jsonl", "a.jsonl", b'{"text": [1, 2]}\n'),
        ("jsonl", "a.jsonl.gz", gzip.compress(LINES)),
        ("jsonl", "a.jsonl.zst", pa.compress(LINES, "zstd", asbytes=True)),
        ("lines", "a.txt", "Gr\u00fc\u00dfe, \u4e16".encode()),
        ("text", "a.txt", b"one"),
        ("jsonl", "a.jsonl", b'{"text": "' + b"x" * 9_000_000 + b'"}\n' + LINES),
    ],
)
def test_what_is_right_or_may_be_is_not_refused(tmp_path: Path, kind: str, name: str, held: bytes) -> None:
    """Single bad rows are counted in training."""
    (tmp_path / name).write_bytes(held)
    look_at_data(DataConfig(corpus=Corpus[kind], path=str(tmp_path / name)))


def test_files_that_fail_are_tolerated_as_in_training_unless_all_do(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jsonl").write_bytes(LINES)
    (tmp_path / "3.jsonl").write_bytes(b"")
    config = DataConfig(corpus=Corpus.jsonl, path=str(tmp_path))
    with pytest.raises(ValueError, match=rf"^data\.path={tmp_path}/3\.jsonl: is empty"):
        look_at_data(config)
    config.max_failed_files = 1
    look_at_data(config)
    for index in range(3):
        (tmp_path / f"{index}.jsonl").write_bytes(b"")
    config.max_failed_files = 9
    with pytest.raises(ValueError, match=rf"^data\.path={tmp_path}/0\.jsonl: is empty"):
        look_at_data(config)


def test_each_source_of_a_mixture_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    config = DataConfig(corpus=Corpus.mix, mix=["corpus=stdlib", f"corpus=jsonl path={tmp_path}/a.jsonl"])
    with pytest.raises(ValueError, match=r"a\.jsonl: holds parquet, and UTF-8 text is read"):
        look_at_data(config)


def empty(folder: Path) -> str:
    return "tokenyard prepare FOLDER data=..."


def with_lines(folder: Path) -> str:
    (folder / "a.jsonl").write_bytes(LINES)
    return f"tokenyard prepare {folder}_shards data=jsonl data.path={folder}"


def with_shards_inside(folder: Path) -> str:
    (folder / "shards").mkdir()
    (folder / "shards/manifest.json").touch()
    return f"data.path={folder}/shards"


@pytest.mark.parametrize("made", [empty, with_lines, with_shards_inside])
def test_prepared_data_that_are_none(tmp_path: Path, made: Callable[[Path], str], capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is at fault, not the tokenizer that it lacks too."""
    (folder := tmp_path / "data").mkdir()
    nearest = made(folder)
    assert main(["train", "data=prepared", f"data.path={folder}", "steps=1"]) == 2
    said = f"tokenyard: data.path={folder}: holds no shards of tokenyard prepare; nearest valid: {nearest}\n"
    assert capsys.readouterr().err == said


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is in a cache; a name that is there is not asked for."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    config = DataConfig(corpus=Corpus.hf, name="our/texts")
    with pytest.raises(DataUnavailable) as error:
        look_at_data(config)
    assert str(error.value) == (
        f"data.name=our/texts: is neither a folder nor in {tmp_path}, and the Hugging Face hub does not answer "
        "(HF_HUB_OFFLINE is set); nearest valid: a folder, or data=parquet data.path=FOLDER of a copy"
    )
    (tmp_path / "datasets--our--texts").mkdir()
    look_at_data(config)
