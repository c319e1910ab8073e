"""Faults 41 and 42: a disk that takes nothing more and weights that are not finite end a run with their own codes, on all ranks."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from fault_run import checkpoint_steps, configured, events_of, heard, losses
from tokenyard.train.logging import journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import run, train_session
from tokenyard.train.setup import open_session


@contextmanager
def full_disk(until: int) -> Iterator[None]:
    """Journals and shards meet ENOSPC, until so many lines were refused."""
    refused, right = 0, os.write

    def write(descriptor: int, content: Any) -> int:
        nonlocal refused
        if refused >= until:
            return right(descriptor, content)
        refused += 1
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_shard(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with mock.patch.object(journal.os, "write", write), mock.patch("tokenyard.checkpoint.writer.write_safetensors", no_shard):
        yield


@pytest.mark.fault(
    41,
    "a disk that takes no byte: `continue` trains to the end, `stop` to the save, both exit 74; records wait for room",
)
@pytest.mark.parametrize(("policy", "last"), [("continue", 8), ("stop", 3)])
def test_a_disk_that_takes_no_line(policy: str, last: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with full_disk(until=12), heard() as lines:
        assert run(configured(folder, f"checkpoint.on_failure={policy}", "checkpoint.asynchronous=false")) == 74
    assert sum("metrics.jsonl cannot be written (No space left on device)" in line for line in lines) == 1
    steps = [step for step, _ in losses(folder)]
    assert steps == list(range(1, last + 1)) if policy == "continue" else len(steps) <= last
    assert checkpoint_steps(folder) == []


@pytest.mark.fault(41)
def test_records_wait_for_room_and_none_is_torn(tmp_path: Path) -> None:
    path, right, room = tmp_path / "metrics.jsonl", os.write, [10]

    def write(descriptor: int, content: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = right(descriptor, content[: room[0]])
        room[0] -= taken
        return taken

    with mock.patch.object(journal.os, "write", write):
        one = journal.Journal(path)
        one.write({"step": 1})
        one.write({"step": 2})
        room[0] = 10**6
        one.write({"step": 3})
        one.close()
    assert [record["step"] for record in journal.read_journal(path)] == [1, 2, 3]


@pytest.mark.fault(41, "a run folder that takes no file: one line, exit 73 on all ranks")
def test_a_folder_that_takes_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run(configured(tmp_path / "file" / "run", "data.cache=null")) == 73
    said = capfd.readouterr().err
    assert said.startswith("tokenyard: run.dir=") and said.count("\n") == 1


def cannot_log(folder: Path) -> str:
    """On ranks of the pool: rank 0 cannot open its journals."""
    session = open_session(configured(folder), torch.device("cpu"))
    with closing(session):
        (folder / "metrics.jsonl").mkdir(exist_ok=True)
        try:
            build_run_logger(session)
        except ValueError as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.fault(41)
def test_all_ranks_hear_that_the_first_cannot_log(ranks: Any, tmp_path: Path) -> None:
    one, other = ranks(2, cannot_log, tmp_path / "run")
    assert one == other and one.startswith("CannotWrite: run.dir=")


def poisoned(folder: Path, overrides: list[str], poison: bool) -> int:
    """On a rank of the pool: weights that are not finite before step 1, or a learning rate that makes them so."""
    session = open_session(configured(folder, *overrides), torch.device("cpu"))
    if poison:
        with torch.no_grad():
            for sharded in session.parallel.parameters.values():
                sharded.parameter.fill_(float("nan"))
    with closing(session), build_run_logger(session) as run_logger:
        return train_session(session, run_logger)


@pytest.mark.fault(42, "lr=1e38 and NaN weights under stop, skip and rollback: exit 70 on both ranks, one event, no checkpoint")
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
@pytest.mark.parametrize("poison", [False, True], ids=["lr=1e38", "NaN weights"])
def test_weights_that_are_not_finite(policy: str, poison: bool, ranks: Any, tmp_path: Path) -> None:
    options = [f"numerics.on_nan={policy}", "numerics.max_skips=2", "checkpoint.every=0", "schedule.warmup=0", "parallel.expert=2"]
    options += [] if poison else ["optimizer.lr=1e38"]
    assert ranks(2, poisoned, tmp_path / "run", options, poison) == [70, 70]
    [stopped] = events_of(tmp_path / "run", "stopped")
    assert stopped["code"] == 70 and not events_of(tmp_path / "run", "failed") and checkpoint_steps(tmp_path / "run") == []
