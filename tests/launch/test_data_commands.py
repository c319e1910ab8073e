"""tokenyard data inspect and tokenyard data verify: what they print and their exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenyard.launch.main import main
from tokenyard.train.config.compose import compose
from tokenyard.train.run import run

SIZES = ["tokenizer=bytes", "model.vocabulary=264", "sequence_length=32", "batch.sequences=4", "evaluate.sequences=4"]


def inspected(capsys: pytest.CaptureFixture[str], cache: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """The output's lines, and the cells of the table's first source by column."""
    assert main(["data", "inspect", "--steps", "3", "--rows", "1", *SIZES, f"data.cache={cache}", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("source "))
    names = lines[at].replace("their tokens", "their_tokens").replace("held out", "held_out").replace("bad rows", "bad_rows")
    return lines, dict(zip(names.split(), lines[at + 1].split(), strict=True))


def test_inspect_counts_a_corpus_without_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"text {number} " + "x" * 20)
    (texts / "bad.txt").write_bytes(b"\xff\xfe")
    (texts / "same.txt").write_text("text 7 " + "x" * 20)
    lines, cells = inspected(capsys, tmp_path / "cache", "data=text", f"data.path={texts}")
    assert (cells["source"], cells["share"], cells["tokens"], cells["epoch"]) == ("text", "1.0000", "384", "0")
    assert int(cells["documents"]) + int(cells["held_out"]) == 40 and (cells["bad_rows"], cells["duplicates"]) == ("1", "1")
    assert 28 * int(cells["documents"]) <= int(cells["their_tokens"].replace(",", "")) <= 29 * int(cells["documents"])
    again, _ = inspected(capsys, tmp_path / "cache", "data=text", f"data.path={texts}")
    assert again == lines and [line for line in lines if line.startswith("all 3 steps: 384 tokens, digest ")]


def test_inspect_counts_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"text": f"row {row} " + "y" * 20}) for row in range(80)] + ["broken"]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    lines, cells = inspected(
        capsys, tmp_path / "cache", "data=jsonl", f"data.path={tmp_path}/rows.jsonl", "data.validation_fraction=0.2"
    )
    assert "bad: jsonl: rows.jsonl row 80: no JSON" in lines
    assert (cells["source"], cells["share"], cells["tokens"], cells["bad_rows"]) == ("jsonl", "1.0000", "384", "1")
    assert int(cells["documents"]) + int(cells["held_out"]) == 80 and "duplicates" not in cells


def test_inspect_ends_as_training_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Too many bad rows end in one line and the exit code of bad data."""
    (tmp_path / "rows.jsonl").write_text(
        "\n".join([json.dumps({"text": f"{row} " + "y" * 40}) for row in range(40)] + ["broken"] * 30)
    )
    words = [
        *SIZES,
        "data=jsonl",
        f"data.path={tmp_path}/rows.jsonl",
        "data.max_bad_fraction=0.1",
        f"data.cache={tmp_path / 'cache'}",
    ]
    assert main(["data", "inspect", "--steps", "3", "--rows", "1", *words]) == 65
    error = capsys.readouterr().err
    assert error.startswith("tokenyard: ") and "data.max_bad_fraction=0.1" in error


@pytest.fixture
def shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    words = ["data=synthetic", "tokenizer=bytes", "data.synthetic_documents=60", f"data.cache={tmp_path / 'cache'}"]
    assert main(["prepare", str(tmp_path / "shards"), "--processes", "1", *words]) == 0
    capsys.readouterr()
    return tmp_path / "shards"


def flip(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_verify(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(shards)]) == 0
    assert f"{shards}: whole; 2 shards, " in capsys.readouterr().out
    flip(shards / "train_00000_00.npy")
    (shards / "validation_00000_00.npy").unlink()
    assert main(["data", "verify", str(shards)]) == 1
    flipped, missing, summary = capsys.readouterr().out.splitlines()
    assert flipped.startswith("train_00000_00.npy: DAMAGED, ") and "hash" in flipped
    assert missing.startswith("validation_00000_00.npy: DAMAGED, ") and "missing" in missing
    assert f"{shards}: 2 of 2 shards are DAMAGED" in summary


@pytest.mark.parametrize("more", [-2, 2])
def test_verify_names_a_shard_of_another_size(shards: Path, capsys: pytest.CaptureFixture[str], more: int) -> None:
    path = shards / "train_00000_00.npy"
    path.write_bytes(path.read_bytes()[:more] if more < 0 else path.read_bytes() + b"x" * more)
    assert main(["data", "verify", str(shards)]) == 1
    assert "train_00000_00.npy: DAMAGED, " in capsys.readouterr().out


def test_verify_refuses_a_manifest_that_was_changed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "manifest.json"
    path.write_text(path.read_text().replace('"documents": ', '"documents": 1'))
    assert main(["data", "verify", str(shards)]) == 2
    assert "manifest.json is damaged: its hash is another" in capsys.readouterr().err
    assert main(["data", "verify", str(shards.parent)]) == 2
    assert "must be a folder that tokenyard prepare has finished" in capsys.readouterr().err


def train(shards: Path, *words: str) -> int:
    """Trains three steps on the shards."""
    tiny = ["model.layers=1", "model.width=32", "model.heads=4", "model.moe.hidden=32", "steps=3", "checkpoint.every=0"]
    own = ["tracker=jsonl", "sample.prompt=", "data=prepared", f"data.path={shards}", f"run.dir={shards.parent / 'run'}"]
    return run(compose([*SIZES, *tiny, *own, f"data.cache={shards.parent / 'cache'}", *words]))


def test_training_compares_sizes_at_once_and_hashes_if_asked(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shards / "train_00000_00.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    assert train(shards) == 2 and str(path) in capsys.readouterr().err
    path.write_bytes(whole)
    flip(path)
    assert train(shards, "data.verify=true") == 65
    assert f"{path} is damaged: its ids have hash " in capsys.readouterr().err
    assert np.load(path, mmap_mode="r").shape
    path.write_bytes(whole)
    assert train(shards, "data.verify=true", f"run.dir={shards.parent / 'again'}") == 0
