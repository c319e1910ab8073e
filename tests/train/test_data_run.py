"""Whole runs on streamed data: resumed, also on other ranks, they see the same batches; what stops the data leaves a checkpoint."""

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_run import heard
from tokenyard.checkpoint.folder import newest_checkpoint
from tokenyard.checkpoint.store import read_facts
from tokenyard.data.config import Corpus
from tokenyard.data.errors import DataUnavailable
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.trackers.trackers import Trackers
from tokenyard.train.preflight import check_config
from tokenyard.train.run import run

TINY = [
    "steps=6",
    "sequence_length=32",
    "batch.sequences=8",
    "model.layers=1",
    "model.width=32",
    "model.heads=4",
    "model.moe.hidden=32",
    "model.vocabulary=264",
    "schedule=constant",
    "schedule.warmup=2",
    "data=jsonl",
    "tokenizer=bytes",
    "tracker=jsonl",
    "evaluate.every=0",
    "evaluate.sequences=8",
    "checkpoint.every=3",
    "sample.prompt=",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": f"shard {shard} row {row} " + "x" * (row % 11)}) for row in range(300)]
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    return folder


def configured(rows: Path, folder: Path, *overrides: str) -> Config:
    own = [f"data.path={rows}", f"data.cache={rows.parent / 'cache'}", "data.window=16", f"run.dir={folder}"]
    return compose([*TINY, *own, *overrides])


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_journal(folder / "metrics.jsonl")]


def run_on_ranks(rows: str, folder: str, overrides: list[str]) -> int:
    return run(configured(Path(rows), Path(folder), *overrides))


def test_resumed_it_is_bitwise_the_same_and_counts_go_on(rows: Path, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(configured(rows, straight)) == 0
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step_00000006")
    assert run(configured(rows, stopped, "data.workers=2")) == 0
    assert losses(stopped) == losses(straight)
    one, other = (read_journal(folder / "metrics.jsonl")[-1] for folder in (straight, stopped))
    counts = {key for key in one if key.startswith("data/")}
    assert "data/jsonl/documents" in counts and {key: one[key] for key in counts} == {key: other[key] for key in counts}
    assert 0 <= one["data_wait_fraction"] <= 1
    facts = [read_facts(folder / "checkpoints" / "step_00000006") for folder in (straight, stopped)]
    assert facts[0]["data_state"] == facts[1]["data_state"] and facts[0]["data_state"]["step"] == 6


def test_other_data_is_refused_unless_allowed(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(configured(rows, tmp_path / "run", "steps=3")) == 0
    (rows / "3.jsonl").write_text(json.dumps({"text": "new"}))
    assert run(configured(rows, tmp_path / "run")) == 2
    assert "data=" in capsys.readouterr().err
    assert run(configured(rows, tmp_path / "run", "data.allow_change=true")) == 0


def test_the_end_of_the_data_is_a_checkpoint_and_exit_code_0(rows: Path, tmp_path: Path) -> None:
    assert run(configured(rows, tmp_path / "run", "data.repeat=false", "steps=1000", "checkpoint.every=0", "log.every=50")) == 0
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and 20 < read_facts(newest)["step"] < 1000


@pytest.mark.fault(19)
def test_an_unavailable_source_is_a_checkpoint_and_exit_code_75(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenyard.data.stream.packing import StreamRows

    original, calls = StreamRows._round, []

    def failing(self: Any) -> None:
        calls.append(1)
        if len(calls) == 5:
            raise DataUnavailable("gone")
        original(self)

    straight = tmp_path / "straight"
    assert run(configured(rows, straight)) == 0
    monkeypatch.setattr(StreamRows, "_round", failing)
    told: list[int] = []
    monkeypatch.setattr(Trackers, "finish", lambda self, code, summary: told.append(code))
    assert run(configured(rows, tmp_path / "run", "steps=40", "checkpoint.every=0")) == 75
    monkeypatch.undo()
    assert told == [75]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and 0 < read_facts(newest)["data_state"]["step"] == read_facts(newest)["step"] < 40


def with_bad_rows(rows: Path, count: int) -> None:
    """So many lines that are no JSON at the end of the last shard: the run has begun when it meets them."""
    with (rows / "2.jsonl").open("a") as file:
        file.writelines(f"\nbroken {number}" for number in range(count))


@pytest.mark.fault(18, "the command ends with 65, a checkpoint and the list; few of them are counted")
def test_too_many_bad_rows_are_a_checkpoint_a_list_and_exit_code_65(rows: Path, tmp_path: Path) -> None:
    with_bad_rows(rows, 12)
    own = [f"data.path={rows}", f"data.cache={tmp_path / 'cache'}", "data.window=16", "steps=1000", "checkpoint.every=0"]
    command = [sys.executable, "-m", "tokenyard", "train", *TINY, *own, "log.every=20", f"run.dir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert answer.returncode == 65, answer.stderr
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and 0 < read_facts(newest)["data_state"]["step"] == read_facts(newest)["step"] < 1000
    assert f"stopped after step {read_facts(newest)['step']}: jsonl: 12 bad rows of " in answer.stderr
    assert [row for row in range(320) if f"2.jsonl row {row}: no JSON" in answer.stderr] == [*range(300, 312)]


@pytest.mark.fault(18)
def test_few_bad_rows_are_counted_in_the_metrics(rows: Path, tmp_path: Path) -> None:
    with_bad_rows(rows, 5)  # the first epoch takes 72 steps
    assert run(configured(rows, tmp_path / "run", "steps=80", "checkpoint.every=0", "log.every=20")) == 0
    counts = [record["data/jsonl/bad_rows"] for record in read_journal(tmp_path / "run" / "metrics.jsonl")]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 5)


@pytest.mark.fault(18, "all of them in events.jsonl with file, row and reason, the first ten in words")
def test_bad_rows_are_events(rows: Path, tmp_path: Path) -> None:
    with_bad_rows(rows, 15)
    limits = ["data.max_bad_fraction=0.5", "log.every=20", "checkpoint.every=0"]
    with heard() as lines:
        assert run(configured(rows, tmp_path / "run", "steps=80", *limits)) == 0
    found = [event for event in read_journal(tmp_path / "run" / "events.jsonl") if event["event"] == "bad_row"]
    assert {(each["source"], each["file"], each["reason"]) for each in found} == {("jsonl", "2.jsonl", "no JSON")}
    assert sorted(each["row"] for each in found) == [*range(300, 315)] and all(0 < each["step"] <= 80 for each in found)
    said = [line for line in lines if "bad row" in line]
    assert len(said) == 10 and all(re.search(r"jsonl: 2\.jsonl row 3\d\d: no JSON", line) for line in said)


@pytest.mark.fault(33, "the command ends with 65 and a checkpoint, and names the file in events.jsonl")
def test_a_file_that_fails_is_an_event_and_exit_code_65(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed = gzip.compress((rows / "2.jsonl").read_bytes())
    (rows / "2.jsonl").unlink()
    (rows / "2.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    limits = ["steps=1000", "log.every=50", "checkpoint.every=0"]
    assert run(configured(rows, tmp_path / "run", *limits)) == 65
    events = read_journal(tmp_path / "run" / "events.jsonl")
    (event,) = (event for event in events if event["event"] == "file_failed")
    (alert,) = (event for event in events if event.get("alert") == "file_failed")
    assert "2.jsonl.gz failed after" in alert["text"]
    assert event["file"] == "2.jsonl.gz" and 0 < event["row"] < 300 and "it is cut off" in event["reason"]
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None and read_facts(newest)["step"] == event["step"] - 1
    out, err = capsys.readouterr()
    assert f"jsonl: 2.jsonl.gz failed after {event['row']} rows: it is cut off" in err
    assert "\nStopped: " in out and "\nDone: " not in out
    assert run(configured(rows, tmp_path / "run", *limits, f"steps={event['step'] + 5}", "data.max_failed_files=1")) == 0


def run_cut_off(rows: str, folder: str, overrides: list[str]) -> tuple[int, str]:
    """Exit code and standard error for a URL behind which nobody listens, in a rank of the pool."""
    from unittest.mock import patch

    error = io.StringIO()
    with contextlib.redirect_stderr(error), patch("tokenyard.train.run.leave"), patch("tokenyard.train.run.join"):
        path = ["data.path='http://127.0.0.1:9/{0..2}.jsonl'", "data.patience_seconds=0.3"]
        return run_on_ranks(rows, folder, [*overrides, *path]), error.getvalue()


@pytest.mark.fault(38, "one line, exit 75 on all ranks, also with a checkpoint to go on from")
@pytest.mark.parametrize("size", [1, 2])
def test_a_source_that_is_down_at_the_start(ranks, rows: Path, tmp_path: Path, size: int) -> None:
    assert run(configured(rows, tmp_path / "run", "steps=3")) == 0
    for folder in ("new", "run"):
        answers = ranks(size, run_cut_off, str(rows), str(tmp_path / folder), [])
        assert [code for code, _ in answers] == [75] * size
        assert answers[0][1].strip().splitlines() == [answers[0][1].strip()]
        assert answers[0][1].startswith("tokenyard: http://127.0.0.1:9/0.jsonl did not answer for 0 s (URLError: ")


def test_on_ranks_it_is_the_same_run(ranks, rows: Path, tmp_path: Path) -> None:
    """4 ranks, then 2, against 1: the states are equal, the losses to rounding."""
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    assert run(configured(rows, straight)) == 0
    assert ranks(4, run_kept, str(rows), str(moved), ["steps=3", "parallel.expert=2"]) == [0] * 4
    assert ranks(2, run_kept, str(rows), str(moved), []) == [0] * 2
    assert losses(moved)[-3:] == pytest.approx(losses(straight)[-3:], rel=1e-5)
    states = [read_facts(folder / "checkpoints" / "step_00000006")["data_state"] for folder in (straight, moved)]
    assert states[0] == states[1]


def run_kept(rows: str, folder: str, overrides: list[str]) -> int:
    """In a rank of the pool, which keeps its process group."""
    from unittest.mock import patch

    with patch("tokenyard.train.run.leave"), patch("tokenyard.train.run.join"):
        return run_on_ranks(rows, folder, overrides)


def test_patience_must_be_shorter_than_collectives_wait(rows: Path, tmp_path: Path) -> None:
    config = configured(rows, tmp_path / "run", "data.patience_seconds=700")
    check_config(config, 1)
    config = replace(config, data=replace(config.data, corpus=Corpus.jsonl))
    with pytest.raises(ValueError, match=r"data\.patience_seconds=700.*stay below parallel\.timeout_seconds=600"):
        check_config(config, 2)
