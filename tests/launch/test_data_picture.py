"""What `data inspect --tokens` draws: equal to plain counting of the documents that were written, within 80 columns."""

import json
from pathlib import Path

import pytest
from tokenyard.data.document_stats import script
from tokenyard.launch.data_picture import doubling, even, histogram
from tokenyard.launch.main import main

TEXTS = [f"Text {row}, " + "x" * (20 * row) for row in range(60)]
TEXTS += ["Text 7, " + "x" * 140, "TEXT  7,\n" + "X" * 140, "\u041f\u0440\u0438\u0432\u0435\u0442 " * 9]
"""With one exact repetition, one but for case and spaces, and one in Cyrillic."""


def inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    words = (
        "tokenizer=bytes",
        f"data.cache={tmp_path}/cache",
        "--steps=1",
        "--tokens",
        "sequence_length=32",
        "batch.sequences=4",
        *words,
    )
    capsys.readouterr()
    assert main(["data", "inspect", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return f"data.path={tmp_path}/rows.jsonl"


def test_the_numbers_are_those_of_counting(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(inspected(tmp_path, capsys, "data=jsonl", rows, "data.validation_fraction=0.2", "--json"))
    stats, sizes = found["documents"], [len(text.encode()) for text in TEXTS]
    assert stats["documents"] == 63 and stats["bytes_of_each"] == sizes
    assert stats["tokens_of_each"] == [size + 1 for size in sizes]  # a token for each byte, and the end
    assert (stats["duplicates"], stats["duplicates_but_for_case_and_spaces"]) == (1, 2)
    joined = "".join(TEXTS)
    expected = {
        "latin": sum(letter.isascii() and letter.isalpha() for letter in joined),
        "cyrillic": 54,
        "digits": sum(letter.isdigit() for letter in joined),
        "spaces": joined.count(" "),
        "punctuation and symbols": joined.count(","),
        "controls and line ends": 1,
    }
    assert stats["characters_by_script"] == expected
    assert len(found["rows"]) == 3 and all(len(row["tokens"]) == 32 for row in found["rows"])


@pytest.mark.parametrize("kind", ["jsonl", "prepared", "text"])
def test_the_picture_fits_80_columns(kind: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=jsonl", rows, "data.validation_fraction=0.2"]
    if kind == "prepared":
        own = [*words, "tokenizer=bytes", f"data.cache={tmp_path}/cache", "--processes=1"]
        assert main(["prepare", str(tmp_path / "shards"), *own]) == 0
        words = ["data=prepared", f"data.path={tmp_path}/shards"]
    if kind == "text":
        (tmp_path / "texts").mkdir()
        for index, text in enumerate(TEXTS):
            (tmp_path / "texts" / f"{index}.txt").write_text(text)
        words = ["data=text", f"data.path={tmp_path}/texts"]
    picture = inspected(tmp_path, capsys, *words)
    assert picture.count("\n  tokens:\n") == 3 and "characters by script" in picture and "latin" in picture
    lines = picture[: picture.index("step 1:")].splitlines() + picture[picture.index("tokens of a document") :].splitlines()
    assert max(map(len, lines)) <= 80


def test_bins_hold_every_value_once() -> None:
    values = [1, 1, 2, 3, 4, 7, 8, 100]
    lines = histogram(values, doubling(max(values)))
    assert [line.split()[-1] for line in lines] == ["2", "2", "2", "1", "0", "0", "1"]
    assert lines[0].startswith("  1 to 2 ") and lines[0].count("#") == 8  # a quarter of 32
    ratios = [1.5, 1.51, 2.0, 3.99]
    assert sum(int(line.split()[-1]) for line in histogram(ratios, even(min(ratios), max(ratios)))) == 4


@pytest.mark.parametrize(
    ("character", "name"),
    [
        ("a", "latin"),
        ("\u00e9", "latin"),
        ("\u4e16", "cjk"),
        ("\u03b1", "greek"),
        ("7", "digits"),
        (" ", "spaces"),
        ("\n", "controls and line ends"),
    ],
)
def test_scripts(character: str, name: str) -> None:
    assert script(character) == name
