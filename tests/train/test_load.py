"""Opening a checkpoint that somebody else has written: what it names outside of its folder is not read."""

import json
from pathlib import Path

import pytest
from tiny_run import TINY_RUN
from tokenyard.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from tokenyard.launch.main import main
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.evaluation import evaluate_session
from tokenyard.train.load import open_for_evaluation
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"the {number} words of a text that is private, " * 20)
    return folder


@pytest.fixture
def checkpoint(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint of a run on those texts, with a tokenizer of its own."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))
    overrides = ["data=text", f"data.path={text}", "tokenizer=sentencepiece", "tokenizer.pieces=300", "model.vocabulary=304"]
    assert (
        run(compose([*TINY_RUN, "steps=2", "evaluate.sequences=4", "sample.tokens=4", f"run.dir={tmp_path / 'run'}", *overrides]))
        == 0
    )
    return tmp_path / "run" / "checkpoints" / "step_00000002"


def changed(checkpoint: Path, **data: object) -> None:
    """As somebody would who means harm: with all hashes right."""
    manifest = read_manifest(checkpoint)
    manifest.facts["config"]["data"] |= data
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint / MANIFEST, manifest)


def test_the_places_of_a_checkpoint_are_not_read(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data\.path: must be said anew.*nearest valid: data\.path={text}"):
        open_for_evaluation(str(checkpoint), [])
    changed(checkpoint, cache=str(tmp_path / "elsewhere"))
    session = open_for_evaluation(str(checkpoint), [f"data.path={text}"])
    assert session.config.data.cache is None and not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("data", "key"),
    [
        ({"corpus": "jsonl", "path": "http://127.0.0.1:9/private.jsonl"}, "path"),
        ({"corpus": "mix", "mix": ["weight=1 corpus=jsonl path=/etc/private.jsonl"], "path": None}, "mix"),
        ({"corpus": "hf", "name": "somebody/set", "path": None}, "name"),
    ],
)
def test_neither_are_its_urls_and_mixtures(checkpoint: Path, data: dict[str, object], key: str) -> None:
    changed(checkpoint, **data)
    with pytest.raises(ConfigError, match=rf"data\.{key}: must be said anew"):
        open_for_evaluation(str(checkpoint), [])


def test_evaluation_takes_the_tokenizer_of_the_checkpoint(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """On other texts, too, of which another one would be trained."""
    session = open_for_evaluation(str(checkpoint), [f"data.path={text}"])
    about = json.loads((checkpoint / "tokenizer" / "tokenizer_about.json").read_text())
    (tmp_path / "others").mkdir()
    for number in range(40):
        (tmp_path / "others" / f"{number}.txt").write_text(f"quite another {number} kind of words, " * 30)
    others = open_for_evaluation(str(checkpoint), [f"data.path={tmp_path / 'others'}"])
    assert session.data.tokenizer.hash == others.data.tokenizer.hash == about["hash"]
    events = read_journal(checkpoint.parents[1] / "events.jsonl")
    trained = next(event["validation_loss"] for event in events if event["event"] == "finished")
    assert evaluate_session(session).loss == pytest.approx(trained, rel=1e-6)


@pytest.mark.parametrize("verb", ["data inspect", "prepare {out}", "tokenizer train {out}", "evaluate {checkpoint}", "train"])
def test_a_source_that_is_down_is_75_by_every_verb(
    checkpoint: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one line, without its secrets."""
    capsys.readouterr()
    words = verb.format(out=tmp_path / "out", checkpoint=checkpoint).split()
    down = ["data.corpus=lines", "data.path=http://me:passw0rd@127.0.0.1:9/x.txt", "data.patience_seconds=0.3"]
    more = ["sequence_length=16", f"run.dir={tmp_path}/down", "tracker=jsonl"] if verb == "train" else []
    code = main([*words, *down, *more])
    said = capsys.readouterr()
    assert code == 75 and said.out == "" and said.err.count("\n") == 1, said
    assert "did not answer for" in said.err and "passw0rd" not in said.err
