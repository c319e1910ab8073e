"""Traces and tables of chosen steps and ranks; snapshots of a GPU's memory with doubles of what torch.cuda has."""

import gzip
import json
import re
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fault_run import configured, losses
from tokenyard.parallel.progress import PROGRESS
from tokenyard.train.config.config import ConfigError, ProfileConfig
from tokenyard.train.derive import derive
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.logging.step_profiler import StepProfiler
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

CPU = torch.device("cpu")
TWO_RANKS = ["parallel.expert=2", "steps=4", "checkpoint.every=0"]


def trained(folder: Path, *overrides: str) -> int:
    session = open_session(configured(folder, *overrides), CPU)
    with closing(session), build_run_logger(session) as run_logger:
        train_session(session, run_logger)
    return session.step


def intervals(trace: Path) -> list[tuple[str, float, float]]:
    """Name, begin and end of all complete events, as Perfetto requires them of a JSON trace."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert all({"name", "ts", "dur", "pid", "tid"} <= event.keys() and event["dur"] >= 0 for event in complete)
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in complete if event.get("cat") != "Trace"]


def test_a_chosen_rank_traces_its_steps_and_the_numbers_stay(ranks: Any, tmp_path: Path) -> None:
    profiled = [*TWO_RANKS, "profile.steps=2-3", "profile.ranks=[1]", "profile.memory=true"]
    for name, words in (("plain", TWO_RANKS), ("profiled", profiled)):
        assert ranks(2, trained, tmp_path / name, *words) == [4, 4]
    assert losses(tmp_path / "profiled") == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["rank1_step2-3.json.gz", "rank1_step2-3.txt"]
    events = intervals(folder / "rank1_step2-3.json.gz")
    steps = {name: (begin, end) for name, begin, end in events if name.startswith("step ")}
    assert steps.keys() == {"step 2", "step 3"}
    for what in ("phase: forward", "phase: backward", "phase: update", "wait: all_to_all over 2 ranks", "aten::mm"):
        found = [(begin, end) for name, begin, end in events if name == what]
        inside = {step for step, (first, last) in steps.items() for begin, end in found if first <= begin <= end <= last}
        assert inside == steps.keys(), what
    text = (folder / "rank1_step2-3.txt").read_text()
    assert text.startswith("steps 2 to 3 of rank 1: ") and "CPU Mem" in text
    shares = {name: float(share) for name, share in re.findall(r"^phase: (\w+) .* ([\d.]+)%$", text, re.MULTILINE)}
    assert {"data", "forward", "backward", "exchange", "update"} <= shares.keys() and 50 < sum(shares.values()) <= 101


def test_a_run_that_ends_among_its_steps_writes_those_that_it_did(tmp_path: Path) -> None:
    session: Any = SimpleNamespace(
        config=SimpleNamespace(profile=ProfileConfig(steps="3-9"), steps=9),
        folder=tmp_path,
        device=CPU,
        parallel=SimpleNamespace(mesh=SimpleNamespace(rank=0)),
    )
    with pytest.raises(RuntimeError, match="out of luck"), StepProfiler(session) as profiler:
        for step in (2, 3, 4, 5):
            with profiler.step(step):
                torch.ones(8, 8) @ torch.ones(8, 8)
                if step == 5:
                    raise RuntimeError("out of luck")
            profiler.after_step(step, snapshot=False)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank0_step3-5.json.gz", "rank0_step3-5.txt"]
    assert PROGRESS.annotated is None


class Memory:
    """What torch.cuda.memory does for snapshots, with the files that it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded: list[Any] = []
        self.observers: list[Any] = []
        monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: self.recorded.append(settings))
        monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("of PyTorch"))
        monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", self.observers.append, raising=False)


def on_gpu(folder: Path, rank: int, memory: bool = True) -> StepProfiler:
    session: Any = SimpleNamespace(
        config=SimpleNamespace(profile=ProfileConfig(ranks=[0, 2], memory=memory), steps=9),
        folder=folder,
        device=torch.device("cuda", 0),
        parallel=SimpleNamespace(mesh=SimpleNamespace(rank=rank)),
    )
    return StepProfiler(session)


def test_snapshots_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    memory = Memory(monkeypatch)
    for rank in range(3):
        with on_gpu(tmp_path, rank) as profiler:
            profiler.after_step(4, snapshot=False)
            profiler.after_step(5, snapshot=True)
    assert len(memory.recorded) == len(memory.observers) == 2
    assert {settings["max_entries"] for settings in memory.recorded} == {200_000}
    memory.observers[1](0, 10, 20, 30)
    names = ["rank0_memory_step5.pickle", "rank2_memory_out_of_memory.pickle", "rank2_memory_step5.pickle"]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == names
    assert capfd.readouterr().err.count("https://pytorch.org/memory_viz") == 3
    with on_gpu(tmp_path, 0, memory=False) as profiler:
        profiler.after_step(6, snapshot=True)
    assert (tmp_path / "profile" / "rank0_memory_step6.pickle").exists() and len(memory.recorded) == 2


def test_a_snapshot_that_cannot_be_written_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Memory(monkeypatch)
    (tmp_path / "profile").write_text("a file")
    with on_gpu(tmp_path, 0) as profiler:
        profiler.after_step(5, snapshot=True)
    assert "rank 0 could not write a snapshot of memory: " in capfd.readouterr().err


def test_on_a_cpu_a_snapshot_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = configured(tmp_path / "run", "profile.memory=true")
    with pytest.raises(ConfigError, match=r"profile\.memory=true: needs a GPU.*nearest valid: profile\.memory=false"):
        derive(config, CPU)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "snapshot").touch()
    assert trained(tmp_path / "run", "steps=2", "checkpoint.every=0") == 2
    assert capfd.readouterr().err.count("a CPU's memory has no snapshots") == 1
    assert not (tmp_path / "run" / "snapshot").exists() and not (tmp_path / "run" / "profile").exists()
