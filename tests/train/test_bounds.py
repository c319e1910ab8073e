"""Checkpoints and runs that somebody made to hurt: exit code 2 and one line, soon, by every verb."""

import argparse
import json
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz
import pytest
import tiny_files
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.launch import generate
from tokenyard.launch.main import main
from tokenyard.parallel.shard import ShardMetadata, disjoint
from tokenyard.train.config.compose import compose
from tokenyard.train.stored_config import ABOUT, LARGEST_TOKENIZER, read_stored

CHUNK = {"file": "shard_00000.safetensors", "key": "x"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_files.tiny_checkpoint(tmp_path / "run" / "checkpoints", compose(tiny_files.TINY))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """With a hash that fits: a hash is no signature."""

    def edit(path: Path) -> None:
        content = json.loads((path / "manifest.json").read_text())
        change(content)
        tiny_files.write_manifest(path / "manifest.json", content)

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


def deep(levels: int) -> dict[str, Any]:
    return {"x": deep(levels - 1)} if levels else {}


def many(count: int) -> Callable[[Path], object]:
    one = {"dtype": "U8", "shape": [0], "chunks": []}
    return edited(lambda content: content["tensors"].update({f"x{number}": one for number in range(count)}))


def unfit(content: dict[str, Any]) -> None:
    content["files"]["y"] = {"bytes": 1 << 52, "hash": "0"}
    chunk = {"file": "y", "key": "y", "offsets": [0], "sizes": [1 << 52]}
    content["tensors"]["model.y"] = {"dtype": "U8", "shape": [1 << 52], "chunks": [chunk]}


ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "layers of 10^9": (model(layers=10**9), r"model\.layers=1000000000: must be in"),
    "experts of 10^12": (
        edited(lambda content: content["facts"]["config"]["model"]["moe"].update(experts=10**12)),
        r"model\.moe\.experts=1000000000000: must be in",
    ),
    "negative width": (model(width=-16), r"model\.width=-16: must be in"),
    "shape of 2^61": (first(lambda one: one.update(shape=[2**61, 1])), r"must be a whole number >= 0 and below"),
    "5,000 dimensions": (first(lambda one: one.update(shape=[1] * 5000)), r"5000 dimensions are more than 16"),
    "bytes of 2^52": (edited(unfit), r"y is missing"),
    "300,000 tensors": (many(300_000), r"more values than what is described"),
    "330 x 330 chunks": (edited(grid), r"is incomplete"),
    "twice": (twice, r"the key 'step' stands there twice"),
    "NaN": (edited(lambda content: content["facts"].update(tokens=float("nan"))), r"NaN is no number in JSON"),
    "facts of a list": (edited(lambda content: content.update(facts=[])), r"facts must be an object"),
    "step of a text": (edited(lambda content: content.update(step="3")), r"'3' must be a whole number"),
    "tensors of a list": (edited(lambda content: content.update(tensors=[])), r"tensors must be an object"),
    "another step": (
        edited(lambda content: (content.update(step=4), content["facts"].update(step=4))),
        r"is of step 4, and its folder is called",
    ),
    "a number of 5,000 digits": (raw(b"[" + b"9" * 5000 + b"]"), r"limit"),
    "16 MB of brackets": (raw(b"[" * (1 << 24)), r"more values than"),
    "16 MB of lists": (raw(b"[" + b"[]," * (5 << 20) + b"0]"), r"more values than"),
    "200 MB of brackets": (raw(b"[" * 200_000_000), r"has 200000000 bytes, more than"),
    "no text": (raw(b"\xff\xfe" * 100), r"can't decode"),
    "a pipe": (a_pipe, r"is no regular file"),
    "a device": (a_device, r"is no regular file"),
}
VERBS = {
    "inspect": lambda path: ["checkpoint", "inspect", path],
    "verify": lambda path: ["checkpoint", "verify", path],
    "diff": lambda path: ["checkpoint", "diff", path, path],
    "generate": lambda path: ["generate", path, "--prompt", "x"],
    "evaluate": lambda path: ["evaluate", path],
    "export": lambda path: ["export", path, f"{path}_out"],
    "train": lambda path: ["train", *tiny_files.TINY, f"checkpoint.resume={path}", f"run.dir={path}_run", "tracker=jsonl"],
}
CASES = 100
LONG = ("330 x 330 chunks", "300,000 tensors")
"""Attacks that take seconds to refuse. Two verbs meet them; TOKENYARD_TESTS=all, which `make portable` sets, lets all verbs."""


@contextmanager
def little_memory() -> Iterator[None]:
    """No more inside of the block than 500 MB beyond what there is."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (fuzz.used() + fuzz.MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_manifest_that_is_none(checkpoint: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, reason = ATTACKS[name]
    change(checkpoint)
    few = name in LONG and os.environ.get("TOKENYARD_TESTS") != "all"
    for verb in ("inspect", "train") if few else VERBS:
        words = VERBS[verb]
        begin = time.process_time()
        with little_memory():
            code = main(words(str(checkpoint)))
        seconds = time.process_time() - begin
        said = capsys.readouterr()
        if (name, verb) == ("bytes of 2^52", "verify"):  # a manifest as they are, of files that are not
            assert code == 1 and said.out.count("\n") == 1
            continue
        assert (verb, code) == (verb, 2), said
        assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("tokenyard: ") and len(said.err) < 1200
        assert re.search(reason, said.err), said.err
        assert seconds < 5, verb


def tensor(name: str, **record: Any) -> Callable[[Path], object]:
    return edited(lambda content: content["tensors"].update({name: {"dtype": "U8", "shape": [0], "chunks": [], **record}}))


def chunk(**change: Any) -> Callable[[Path], object]:
    return first(lambda one: one["chunks"][0].update(change))


def attached(name: str, text: bytes, size: int = 0) -> Callable[[Path], object]:
    """A file of the tokenizer that is this, or of this size, and listed so."""

    def edit(path: Path) -> None:
        (path / name).write_bytes(text)
        os.truncate(path / name, size or len(text))
        record = {"bytes": size, "hash": "0"} if size else tiny_files.record(path / name)
        edited(lambda content: content["attachments"].update({name: record}))(path)

    return edit


def half_a_character(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"torch": "2"', '"torch": "\\ud800"'))


def by_hand(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"tokens": 9', '"tokens": 8'))


SCHEMA: dict[str, tuple[Callable[[Path], object], str]] = {
    "a fact of another kind": (edited(lambda content: content["facts"].update(run_id=7)), r"facts\.run_id = 7 must be a word"),
    "a fact of 400 digits": (edited(lambda content: content["facts"].update(extra={"x": 10**400})), "facts: a number that is too"),
    "400 levels": (edited(lambda content: content["facts"].update(extra=deep(400))), "facts: nested too deeply"),
    "another shape": (model(width=32), r"must be \(264, 32\) by its configuration and has the shape \(264, 16\)"),
    "a layer more": (model(layers=3), "by its configuration and is missing"),
    "a thousand layers": (model(layers=1000), r"model\.layers=1000: .* holds \d+ tensors"),
    "a tensor more": (tensor("model.y"), r"tensor 'model\.y' is none of the model"),
    "a file more": (lambda path: (path / "y").touch(), r"y is not listed in manifest\.json"),
    "a tokenizer of 128 MiB": (attached("tokenizer/x.model", b"", LARGEST_TOKENIZER + 1), r"x\.model has \d+ bytes, more than"),
    "a tokenizer of a list": (attached(ABOUT, b"[]"), r"tokenizer_about\.json must be a JSON object"),
    "a name that steers a terminal": (tensor("\x1b[2J"), r"'\\x1b\[2J' must be a name of at most 512 printable"),
    "a name of 513 letters": (tensor("x" * 513), "must be a name of at most 512 printable"),
    "a file elsewhere": (edited(lambda content: content["files"].update({"../x": {"bytes": 0, "hash": "0"}})), "a plain name"),
    "more than there is": (edited(lambda content: content["files"][CHUNK["file"]].update(bytes=9)), "is said to hold"),
    "a chunk beyond its shape": (chunk(offsets=[1, 0]), "a chunk must lie inside of the shape"),
    "140,000 tensors": (many(140_000), r"\d+ tensors are more than the 131072"),
    "a step of its own": (edited(lambda content: content["facts"].update(step=4)), r"step = 3 must be facts\.step = 4"),
    "a chunk of nothing": (chunk(sizes=[0, 16]), "a chunk must hold something"),
    "half a tensor": (chunk(sizes=[132, 16]), "is incomplete: its chunks must cover"),
    "a chunk twice": (
        first(lambda one: one.update(chunks=[one["chunks"][0] | {"sizes": [132, 16]}] * 2)),
        "is incomplete: its chunks must cover",
    ),
    "half a character": (half_a_character, "holds a half of a character"),
    "fewer than nothing": (tensor("y", shape=[-1]), "-1 must be a whole number"),
    "a truth for a number": (edited(lambda content: content.update(step=True)), "True must be a whole number"),
    "another hash": (by_hand, "does not have the hash that it states"),
}


@pytest.mark.parametrize("name", SCHEMA)
def test_each_rule_of_the_schema(checkpoint: Path, name: str) -> None:
    change, reason = SCHEMA[name]
    change(checkpoint)
    with pytest.raises(ValueError, match=reason):
        read_stored(checkpoint)


def test_what_is_whole_is_read(checkpoint: Path, tmp_path: Path) -> None:
    assert read_stored(checkpoint)[1].model.layers == 2
    for kind, make in {
        "hf": tiny_files.tiny_hugging_face,
        "run": lambda made: tiny_files.tiny_run(made / "x", compose(tiny_files.TINY)),
    }.items():
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
    """The arms of a pinwheel are disjoint, though no cut separates it; moved by one its arms overlap."""
    arms = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]

    def of(places: list[Any]) -> list[ShardMetadata]:
        return [ShardMetadata((3, 3), offsets, sizes) for offsets, sizes in places]

    with pytest.raises(ValueError, match="its 300 chunks are cut as no layout cuts a tensor"):
        disjoint(of([((place,), (2,)) for place in range(300)]))
    assert disjoint(of(arms)) and not disjoint(of([*arms, ((1, 1), (1, 1))])) and not disjoint(of([((0, 0), (2, 2)), *arms[1:]]))


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [LAUGHS, "steps: " + "9" * 400, "model: {layers: 1000000000}", "[" * 60_000, "x" * 200_000, f"# {'x' * 66_000}\nsteps: 1"],
)
def test_a_configuration_in_a_report(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_files.tiny_run(tmp_path, compose(tiny_files.TINY))
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


def test_what_a_model_generates_does_not_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate, "open_checkpoint", lambda *_: mock.Mock())
    monkeypatch.setattr(generate, "continuation", lambda *_: iter(["a\x1b[2J", "\x9b31m"]))
    wish = {
        "checkpoint": "x",
        "prompt": "p",
        "tokens": 2,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": None,
        "seed": 1,
        "json": False,
    }
    assert generate.generate_command(argparse.Namespace(**wish)) == 0
    assert capsys.readouterr().out.rstrip() == "pa\\x1b[2J\\x9b31m"


def test_some_fuzz() -> None:
    """As many cases as an idle machine tries in a few seconds, the same ones everywhere; `make fuzz` goes on for minutes."""
    assert fuzz.fuzz(seed=1, seconds=300, most=CASES) == (CASES, None)
