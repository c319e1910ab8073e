"""Memory and waits of ranks: the worst, which it is, the mean; of a GPU by doubles of torch.cuda's counters."""

import mmap
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.parallel.progress import waiting, waiting_for_device
from tokenyard.train.config.compose import compose
from tokenyard.train.logging import rank_stats
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.rank_stats import RankStats, host_memory, process_memory, rank_metrics
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.logging.step_log import Stopwatch, Waits
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

CPU, GIB = torch.device("cpu"), 2**30


def test_a_large_tensor_is_seen_and_its_peak_stays() -> None:
    before, _ = process_memory()
    large = mmap.mmap(-1, 64 * 2**20)  # not what an allocator has kept
    for page in range(0, len(large), mmap.PAGESIZE):
        large[page] = 1
    during, _ = process_memory()
    assert 0.9 * len(large) < during - before < 1.5 * len(large) + 2**20
    large.close()
    after, peak = process_memory()
    assert after < during <= peak + 2**20 and peak <= host_memory()  # Linux counts in batches


def test_a_container_has_the_memory_that_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_stats, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = host_memory()
    for text, limit in (("max\n", whole), (f"{GIB}\n", GIB), (f"{2 * whole}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert host_memory() == limit


GPUS = [
    {"allocated_bytes.all.current": 3 * GIB, "reserved_bytes.all.current": 5 * GIB, "allocated_bytes.all.peak": 4 * GIB,
     "reserved_bytes.all.peak": 6 * GIB, "num_alloc_retries": 2},
    {"allocated_bytes.all.current": 1 * GIB, "reserved_bytes.all.current": 9 * GIB, "allocated_bytes.all.peak": 7 * GIB,
     "reserved_bytes.all.peak": 9 * GIB, "num_alloc_retries": 0},
]  # fmt: skip


def over_two_gpus(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What the all-reduces of two ranks make of these counters; sums and maxima are taken here."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10 * GIB))
    monkeypatch.setattr(rank_stats, "process_memory", lambda: (GIB, GIB))
    monkeypatch.setattr(rank_stats, "on_device", lambda x, device: x)
    monkeypatch.setattr(rank_stats, "max_over", lambda x, axis: x)
    monkeypatch.setattr(rank_stats, "sum_over", lambda x, axis: x)
    of_ranks = []
    for rank, stats in enumerate(GPUS):
        session: Any = SimpleNamespace(
            device=torch.device("cuda", rank), parallel=SimpleNamespace(mesh=SimpleNamespace(rank=rank, everyone=None))
        )
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device, stats=stats: stats)
        of_ranks.append(RankStats(session).over_ranks(Waits(exchange=0.5 + rank, device=0.25 * rank)))
    worst, total = torch.stack(of_ranks).unbind(1)
    return torch.stack([worst.amax(0), total.sum(0)])


def test_of_gpus_the_worst_and_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    gb = GIB / 1e9
    assert rank_metrics(over_two_gpus(monkeypatch), 2, True, seconds=5.0) == pytest.approx(
        {
            "system/memory_allocated_gb": 3 * gb,
            "system/memory_allocated_gb_mean": 2 * gb,
            "system/memory_reserved_gb": 9 * gb,
            "system/memory_reserved_gb_mean": 7 * gb,
            "system/memory_resident_gb": gb,
            "system/memory_resident_gb_mean": gb,
            "system/memory_peak_gb": 7 * gb,
            "system/memory_peak_gb_mean": 5.5 * gb,
            "system/memory_peak_gb_rank": 1,
            "system/memory_share": 0.9,
            "system/allocation_retries": 2,
            "perf/host_wait_fraction": 0.025,
            "perf/exchange_fraction": 0.3,
            "perf/exchange_fraction_mean": 0.2,
        }
    )


def test_waits_are_those_of_training_by_kind() -> None:
    stopwatch = Stopwatch(CPU)
    with waiting("a collective"):
        time.sleep(0.02)
    with stopwatch.paused(), waiting("a validation"):
        time.sleep(0.5)
    with waiting_for_device():
        time.sleep(0.01)
    waits = stopwatch.take()[2]
    assert 0.02 <= waits.exchange < 0.5 and 0.01 <= waits.device < 0.5
    assert stopwatch.take()[2] == Waits(0.0, 0.0)


def seen(largest: int, folder: Path) -> list[dict[str, Any]]:
    """The records of a run on two ranks, of which `largest` says that it has 3 GB and had 4, the other 1 and 2."""
    words = [f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", "evaluate.sequences=8", "steps=3"]
    session = open_session(compose([*TINY_RUN, *words, "debug.dry_step=false", "parallel.expert=2", "sample.tokens=0"]), CPU)
    of_rank = (3 * 10**9, 4 * 10**9) if session.parallel.mesh.rank == largest else (10**9, 2 * 10**9)
    with (
        mock.patch.object(rank_stats, "process_memory", lambda: of_rank),
        mock.patch.object(rank_stats, "host_memory", lambda: 16 * 10**9),
        closing(session),
        build_run_logger(session) as run_logger,
    ):
        assert train_session(session, run_logger) == 0
    return read_journal(folder / "metrics.jsonl") if session.parallel.mesh.rank == 0 else []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_names_the_rank_with_the_most_memory(ranks: Any, tmp_path: Path, rank: int) -> None:
    records = ranks(2, seen, rank, tmp_path / "run")[0]
    assert {key: value for key, value in records[-1].items() if key.startswith("system/")} == {
        "system/memory_resident_gb": 3.0,
        "system/memory_resident_gb_mean": 2.0,
        "system/memory_peak_gb": 4.0,
        "system/memory_peak_gb_mean": 3.0,
        "system/memory_peak_gb_rank": rank,
        "system/memory_share": 0.5,
    }
    assert 0 < records[-1]["perf/exchange_fraction_mean"] <= records[-1]["perf/exchange_fraction"] < 1
    assert "perf/host_wait_fraction" not in records[-1]
