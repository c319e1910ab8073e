"""Streams, events and copies on a double of torch.cuda: which stream of which device, in which order, and what waits for it."""

import re
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any

import cuda_double
import pytest
import torch
from cuda_double import CudaDouble
from tokenyard.parallel import streams

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> CudaDouble:
    """The main thread's current device is 1, as on the second rank of a host."""
    double = cuda_double.installed(monkeypatch)
    double.set_device(1)
    double.calls.clear()
    return double


def in_a_thread(name: str, work: Any) -> None:
    thread = Thread(target=work, name=name)
    thread.start()
    thread.join()


def test_a_new_thread_works_with_its_device(cuda: CudaDouble) -> None:
    found = []

    def work() -> None:
        found.append(cuda.current_device())
        streams.enter_thread(SECOND)
        found.append(cuda.current_device())

    in_a_thread("writer", work)
    assert found == [0, 1] and cuda.of("writer") == [("set_device", 1)]


def test_a_side_stream_begins_behind_an_event_and_the_host_waits_behind_the_copies(cuda: CudaDouble) -> None:
    x = cuda.tensor(torch.arange(3.0), 1)
    ready, found = streams.record_event(SECOND), []

    def work() -> None:
        streams.enter_thread(SECOND)
        memory = streams.host_memory(x)
        with streams.SideStream(SECOND).behind(ready, x):
            streams.copy_to_host(x, memory)
            copied = streams.record_event(SECOND)
        found.extend([copied.done(), memory.tolist()])
        copied.wait()
        found.extend([copied.done(), memory.tolist()])
        assert memory.data_ptr() in cuda.pinned

    in_a_thread("writer", work)
    assert found == [False, [-1.0] * 3, True, [0.0, 1.0, 2.0]]
    assert cuda.of("MainThread") == [("record", "cuda:1 default")]
    assert cuda.of("writer") == cuda_double.COPIED_ASIDE


def test_the_stream_that_computes_waits_for_a_batch_copied_ahead(cuda: CudaDouble) -> None:
    with streams.SideStream(SECOND).behind(streams.record_event(SECOND)):
        ids_BS = streams.on_device(torch.zeros(2, 4), SECOND)
        arrived = streams.record_event(SECOND)
    streams.stream_waits(arrived, ids_BS)
    assert cuda.of("MainThread")[2:] == [
        ("wait_event", "cuda:1 side"),
        ("copy to device", "cuda:1 side"),
        ("record", "cuda:1 side"),
        ("wait_event", "cuda:1 default"),
        ("record_stream", "cuda:1 default"),
    ]


def test_numbers_are_read_later_as_they_were(cuda: CudaDouble) -> None:
    x, y = cuda.tensor(torch.tensor([1.0, 2.0]), 1), cuda.tensor(torch.tensor([3]), 1)
    copy = streams.to_host([x, y])
    assert not copy.done() and not any(call.what == "event.synchronize" for call in cuda.calls)
    again = streams.to_host([x, y])
    assert [found.tolist() for found in copy.get()] == [[1.0, 2.0], [3]] and copy.done() and not again.done()
    assert cuda.of("MainThread")[:3] == [("copy", "cuda:1 default")] * 2 + [("record", "cuda:1 default")]
    assert len({found.data_ptr() for found in [*copy.get(), *again.get()]} & set(cuda.pinned)) == 4


def test_time_is_that_of_the_device(cuda: CudaDouble) -> None:
    first, second = streams.record_event(SECOND, timed=True), streams.record_event(SECOND, timed=True)
    assert streams.seconds_between(first, second) == pytest.approx(1.0)


def test_on_a_cpu_all_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("set_device", "Stream", "Event", "stream", "current_stream"):
        monkeypatch.delattr(torch.cuda, name)
    x = torch.ones(2)
    streams.enter_thread(CPU)
    first = streams.record_event(CPU, timed=True)
    with streams.SideStream(CPU).behind(first, x):
        copy = streams.to_host([x])
    x.zero_()
    streams.stream_waits(first, x)
    assert copy.done() and copy.get()[0].tolist() == [1.0, 1.0]
    assert streams.on_device(x, CPU) is x
    first.wait()
    sleep(0.01)
    assert streams.seconds_between(first, streams.record_event(CPU, timed=True)) >= 0.01


def test_nothing_else_of_the_project_makes_them() -> None:
    made = re.compile(r"cuda\.(Stream|Event|stream|set_device|current_stream)\b|pin_memory|non_blocking|record_stream")
    others = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("bench", "plan", "tests", ".venv")]
    found = [path.relative_to(ROOT).as_posix() for path in others if made.search(path.read_text())]
    assert found == ["parallel/streams.py"]
