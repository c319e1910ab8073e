"""Checkpoints, Hugging Face folders and runs that somebody made to hurt: exit code 2 and one line, soon, by every verb."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz
import pytest
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.launch.main import main
from tokenyard.parallel.shard import apart
from tokenyard.train.checkpoint.stored_config import read_stored
from tokenyard.train.config.compose import compose

CHUNK = {"file": "shard_00000.safetensors", "key": "x"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return fuzz.tiny_checkpoint(tmp_path / "run" / "checkpoints", compose(fuzz.TINY))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """With a hash that fits: a hash is no signature."""

    def edit(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        change(content)
        fuzz.write_manifest(path / "manifest.json", content)

    return edit


def raw(text: bytes) -> Callable[[Path], object]:
    return lambda path: (path / "manifest.json").write_bytes(text)


def a_pipe(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def a_device(path: Path) -> None:
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("/dev/zero")


def model(**settings: Any) -> Callable[[Path], object]:
    return edited(lambda content: content["facts"]["config"]["model"].update(settings))


def first(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return edited(lambda content: change(next(iter(content["tensors"].values()))))


def twice(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[:-1] + ', "step": 3}')


def grid(content: dict[str, Any]) -> None:
    """330 x 330 chunks, and one that lies on another."""
    chunks = [{**CHUNK, "offsets": [row, column], "sizes": [1, 1]} for row in range(330) for column in range(330)]
    chunks[-1] = chunks[0]
    content["tensors"]["model.x"] = {"dtype": "U8", "shape": [330, 330], "chunks": chunks}
    content["files"][CHUNK["file"]]["bytes"] += 330 * 330


def many(content: dict[str, Any]) -> None:
    content["tensors"] |= {f"x{number}": {"dtype": "U8", "shape": [0], "chunks": []} for number in range(300_000)}


def unfit(content: dict[str, Any]) -> None:
    content["files"]["y"] = {"bytes": 1 << 52, "hash": "0"}
    chunk = {"file": "y", "key": "y", "offsets": [0], "sizes": [1 << 52]}
    content["tensors"]["model.y"] = {"dtype": "U8", "shape": [1 << 52], "chunks": [chunk]}


ATTACKS: dict[str, Callable[[Path], object]] = {
    "layers of 10^9": model(layers=10**9),
    "experts of 10^12": edited(lambda content: content["facts"]["config"]["model"]["moe"].update(experts=10**12)),
    "negative width": model(width=-16),
    "shape of 2^61": first(lambda one: one.update(shape=[2**61, 1])),
    "5,000 dimensions": first(lambda one: one.update(shape=[1] * 5000)),
    "bytes of 2^52": edited(unfit),
    "300,000 tensors": edited(many),
    "330 x 330 chunks": edited(grid),
    "twice": twice,
    "NaN": edited(lambda content: content["facts"].update(tokens=float("nan"))),
    "facts of a list": edited(lambda content: content.update(facts=[])),
    "step of a text": edited(lambda content: content.update(step="3")),
    "tensors of a list": edited(lambda content: content.update(tensors=[])),
    "another step": edited(lambda content: (content.update(step=4), content["facts"].update(step=4))),
    "a number of 5,000 digits": raw(b"[" + b"9" * 5000 + b"]"),
    "16 MB of brackets": raw(b"[" * (1 << 24)),
    "16 MB of lists": raw(b"[" + b"[]," * (5 << 20) + b"0]"),
    "200 MB of brackets": raw(b"[" * 200_000_000),
    "no text": raw(b"\xff\xfe" * 100),
    "a pipe": a_pipe,
    "a device": a_device,
}
VERBS = {
    "inspect": lambda path: ["checkpoint", "inspect", path],
    "verify": lambda path: ["checkpoint", "verify", path],
    "diff": lambda path: ["checkpoint", "diff", path, path],
    "generate": lambda path: ["generate", path, "--prompt", "x"],
    "evaluate": lambda path: ["evaluate", path],
    "export": lambda path: ["export", path, f"{path}_out"],
    "train": lambda path: ["train", *fuzz.TINY, f"checkpoint.resume={path}", f"run.dir={path}_run", "tracker=jsonl"],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_manifest_that_is_none(checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    ATTACKS[name](checkpoint)
    for verb, words in VERBS.items():
        begin = time.process_time()
        code = main(words(str(checkpoint)))
        seconds = time.process_time() - begin
        said = capsys.readouterr()
        if (name, verb) == ("bytes of 2^52", "verify"):  # a manifest as they are, of files that are not
            assert code == 1 and said.out.count("\n") == 1
            continue
        assert (verb, code) == (verb, 2), said
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("tokenyard: ") and len(said.err) < 1200
        assert seconds < 5, verb


def test_what_is_whole_is_read(checkpoint: Path, tmp_path: Path) -> None:
    assert read_stored(checkpoint)[1].model.layers == 2
    for kind, make in {"hf": fuzz.tiny_hugging_face, "run": lambda made: fuzz.tiny_run(made / "x", compose(fuzz.TINY))}.items():
        (tmp_path / "x").mkdir(exist_ok=True)
        fuzz.READERS[kind](make(tmp_path))


def test_a_hundred_thousand_chunks_are_read(checkpoint: Path) -> None:
    def cut(content: dict[str, Any]) -> None:
        chunks = [{**CHUNK, "offsets": [row, column], "sizes": [1, 1]} for row in range(330) for column in range(300)]
        content["tensors"]["optimizer.x"] = {"dtype": "U8", "shape": [330, 300], "chunks": chunks}
        content["files"][CHUNK["file"]]["bytes"] += 330 * 300

    edited(cut)(checkpoint)
    begin = time.process_time()
    assert len(read_manifest(checkpoint).tensors["optimizer.x"].chunks) == 99_000
    assert time.process_time() - begin < 5


def test_cuts_that_no_line_crosses() -> None:
    """A pinwheel is apart, though no cut separates it; moved by one its arms overlap."""
    arms = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]

    def of(places: list[Any]) -> Any:
        return [type("Arm", (), {"offsets": offsets, "sizes": sizes}) for offsets, sizes in places]

    assert apart(of(arms)) and not apart(of([*arms, ((1, 1), (1, 1))])) and not apart(of([((0, 0), (2, 2)), *arms[1:]]))


HUGGING_FACE = {
    "layers of 10^9": lambda about: about.update(num_hidden_layers=10**9),
    "experts of 10^12": lambda about: about.update(num_local_experts=10**12),
    "a number of 400 digits": lambda about: about.update(rms_norm_eps=10**400),
    "NaN": lambda about: about.update(rms_norm_eps=float("nan")),
    "a list": lambda about: about.update(vocab_size=[1] * 100_000),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_hugging_face_folder_that_is_none(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = fuzz.tiny_hugging_face(tmp_path)
    about = json.loads((path / "config.json").read_text())
    HUGGING_FACE[name](about)
    (path / "config.json").write_text(json.dumps(about))
    for words in (["import", str(path), str(tmp_path / "out")], ["params", str(path)]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 1200


def test_pipes_in_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fuzz.tiny_hugging_face(tmp_path)
    for name in ("config.json", "model-1.safetensors"):
        kept = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        assert main(["import", str(path), str(tmp_path / "out")]) == 2 and capsys.readouterr().err.count("\n") == 1
        (path / name).unlink()
        (path / name).write_bytes(kept)


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)


@pytest.mark.parametrize("text", [LAUGHS, "steps: " + "9" * 400, "model: {layers: 1000000000}", "[" * 60_000, "x" * 200_000])
def test_a_configuration_in_a_report(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = fuzz.tiny_run(tmp_path, compose(fuzz.TINY))
    (path / "config.yaml").write_text(text)
    begin = time.process_time()
    assert main(["report", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 1200 and time.process_time() - begin < 5


def test_names_do_not_steer_a_terminal(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint.parent.parent.rename(tmp_path / "\x1b[31mred\x07")
    assert main(["checkpoint", "inspect", str(path)]) == 0
    assert main(["checkpoint", "verify", str(path / "nothing")]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and "\\x1b[31mred\\x07" in said.out and "\\x1b[31mred" in said.err


def test_thirty_seconds_of_fuzz() -> None:
    tried, wrong = fuzz.fuzz(seed=1, seconds=30)
    assert wrong is None and tried > 10
