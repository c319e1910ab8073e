"""Faults 45 to 47: damaged journals, a disk that will be short, and signals that come too early."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fault_run import configured, events_of, heard, losses
from tokenyard.train.run import run

JOURNALS = ("metrics.jsonl", "events.jsonl", "telemetry.jsonl")


@pytest.mark.fault(
    45,
    "a damaged line in each journal: set aside with the date, which is said once; readable lines stay, the run resumes",
)
def test_damaged_journals_do_not_stop_a_resume(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(configured(folder, "steps=4", "telemetry.every=1")) == 0
    damaged = {name: (folder / name).read_bytes().replace(b"{", b"\xff", 1) for name in JOURNALS}
    first, _, rest = (folder / "events.jsonl").read_bytes().partition(b"\n")  # by which the accounts of time begin
    damaged["events.jsonl"] = first + b"\n" + rest.replace(b"{", b"\xff", 1)
    damaged["metrics.jsonl"] = damaged["metrics.jsonl"].replace(b'"step": 3', b'"step": "3"')
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    with heard() as lines:
        assert run(configured(folder, "telemetry.every=1")) == 0
    assert [step for step, _ in losses(folder)] == [2, 4, 5, 6, 7, 8]
    for name, content in damaged.items():
        [aside] = folder.glob(f"{name}.damaged-2*")
        assert aside.read_bytes() == content
    assert sorted(Path(event["path"]).name for event in events_of(folder, "journal_set_aside")) == sorted(JOURNALS)
    assert sum("had damaged lines" in line for line in lines) == 3


def short(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> None:
    """`free` bytes on the disk, in this order; the last one from then on."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=free.pop(0) if len(free) > 1 else free[0]))


@pytest.mark.fault(
    46,
    "no room for a checkpoint: exit 73 before the first step, on one rank too; too little later: an alert one interval ahead",
)
def test_one_rank_looks_for_room_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch, [5000])
    folder = tmp_path / "run"
    assert run(configured(folder, "debug.dry_step=null")) == 73
    [event] = events_of(folder, "stopped")
    assert event["step"] == 0 and "5,000 bytes free" in event["reason"] and not losses(folder)


@pytest.mark.fault(46)
def test_the_next_save_is_looked_at_an_interval_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short(monkeypatch, [10**12, 5000, 10**12])  # asked by the save of 3, after it, and from then on
    folder = tmp_path / "run"
    assert run(configured(folder, "checkpoint.asynchronous=false")) == 0
    [alert] = [event for event in events_of(folder, "alert") if event["alert"] == "disk"]
    assert alert["step"] < 6 and "5,000 bytes free" in alert["text"]


PROGRAM = (
    "import os, sys, time; os.write(1, b'x'); time.sleep(1); import runpy; runpy.run_module('tokenyard.train', run_name='__main__')"
)


@pytest.mark.fault(47)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_is_born_with_its_signals_held_back(number: signal.Signals, tmp_path: Path) -> None:
    """Our launcher starts ranks so: a signal in the first second of Python itself is heard when the run listens."""
    from tokenyard.train.fault_tolerance.signals import signals_blocked

    with signals_blocked():
        child = subprocess.Popen([sys.executable, "-c", PROGRAM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert child.stdout is not None and child.stdout.read(1) == b"x"
        child.send_signal(number)
        output, _ = child.communicate(timeout=100)
    assert child.returncode in (0, 2), output


LAUNCHER = """
import os, signal, subprocess, sys, time
from tokenyard.train.fault_tolerance.signals import signals_blocked

heard = []
signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
with signals_blocked():
    child = subprocess.Popen([sys.executable, "-c", "import signal; print(signal.pthread_sigmask(0, []))"], stdout=-1)
    os.kill(os.getpid(), signal.SIGUSR1)
    deadline = time.monotonic() + 20
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
    at_once, output = list(heard), child.communicate()[0]
assert at_once == [signal.SIGUSR1] and b"SIGUSR1" in output, (at_once, output)
"""


@pytest.mark.fault(
    47, "a signal before a rank has handlers: held back from its birth, and heard later; the launcher hears it at once"
)
def test_the_launcher_hears_signals_that_its_children_do_not() -> None:
    """In a process of its own, which has no other thread that could take the signal."""
    done = subprocess.run([sys.executable, "-c", LAUNCHER], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
