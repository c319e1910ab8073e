"""A run on CPUs says in one line when other processes hold the cores that its threads need."""

from pathlib import Path

import pytest
import torch
from tokenyard.train import busy_cores

CPU = torch.device("cpu")
ADVICE = "GOMP_SPINCOUNT=10000 in the environment lets waiting threads sleep"


def stat(*cores: tuple[int, int]) -> str:
    """Returns /proc/stat of cores with these busy and idle ticks; the last columns are those of guests, which users have too."""
    lines = [f"cpu{core} {busy} 0 0 {idle - 1} 1 0 0 0 {busy} 0" for core, (busy, idle) in enumerate(cores)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 0 0 0", *lines, "intr 12 3"])


@pytest.mark.parametrize(
    ("after", "threads", "ranks", "mine", "held"),
    [
        ([(110, 900), (100, 910)], 2, 1, 0.0, "1.0 of 2 cores"),
        ([(110, 900), (110, 900)], 1, 1, 0.0, "2.0 of 2 cores"),
        ([(110, 900), (100, 910)], 1, 2, 0.0, "1.0 of 2 cores"),
        ([(110, 900), (100, 910)], 1, 1, 0.0, None),  # the other core is enough
        ([(104, 906), (100, 910)], 2, 1, 0.0, None),
        ([(110, 900), (107, 903)], 2, 1, 0.1, "0.7 of 2 cores"),
        ([(110, 900), (110, 900)], 1, 2, 0.1, None),  # threads of both ranks, as they load data
    ],
)
def test_cores_that_others_hold_are_named_in_one_line(
    after: list[tuple[int, int]],
    threads: int,
    ranks: int,
    mine: float,
    held: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, said = tmp_path / "stat", list[str]()
    file.write_text(stat((100, 900), (100, 900), (100, 900)))
    seconds = iter([5.0, 5.0 + mine])
    monkeypatch.setattr(busy_cores, "STAT", file)
    monkeypatch.setattr(busy_cores.time, "sleep", lambda _: file.write_text(stat(*after, (110, 900))))
    monkeypatch.setattr(busy_cores.time, "process_time", lambda: next(seconds))
    monkeypatch.setattr(busy_cores.os, "sched_getaffinity", lambda _: {0, 1})  # the third is not ours
    monkeypatch.setattr(busy_cores.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(busy_cores.log, "warning", lambda text, *values: said.append(text % values))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    busy_cores.warn_of_busy_cores(CPU)
    expected = [] if held is None else [f"other processes hold {held}, and each operator waits for its slowest thread; {ADVICE}"]
    assert said == expected


def test_a_gpu_and_a_system_without_counters_are_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy_cores.time, "sleep", lambda _: pytest.fail("watched"))
    busy_cores.warn_of_busy_cores(torch.device("cuda"))
    monkeypatch.setattr(busy_cores, "STAT", Path("/proc/no such file"))
    busy_cores.warn_of_busy_cores(CPU)
