"""The benchmark of two ranks: what it calls waiting is waiting, and its sides train on the same batches."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_run import TINY_RUN
from tokenyard.bench.comm_trace import CollectiveTimes, split_times, trace_collectives
from tokenyard.bench.ranks import LAYOUTS, measure, parse, table


def test_a_rank_that_comes_first_waits() -> None:
    """Two collectives of both ranks: one blocks from its beginning, one is begun at 5 and waited for at 6 (rank 1: 8)."""
    first: list[CollectiveTimes] = [[1.0, 1.0, 4.0], [5.0, 6.0, 9.0]]
    second: list[CollectiveTimes] = [[3.0, 3.0, 4.5], [7.0, 8.0, 9.0]]
    one, two = split_times([10.0, 10.5], [first, second])
    assert one == (10 - 3 - 3, (4 - 3) + (9 - 7), (3 - 1) + (7 - 6))
    assert two == (10.5 - 1.5 - 1, 1.5 + 1, 0)
    with pytest.raises(AssertionError, match="different collectives"):
        split_times([1.0, 1.0], [first, first[:1]])


def test_times_of_real_ranks(ranks: Any) -> None:
    """Rank 1 is a fifth of a second late for the second of three collectives."""
    seconds, traces = zip(*ranks(2, three_collectives), strict=True)
    assert [len(own) for own in traces] == [3, 3]
    first, second = split_times(list(seconds), list(traces))
    assert first.waiting > 0.15 > second.waiting
    assert sum(first) == pytest.approx(seconds[0])
    begun, waited, _ = traces[0][2]
    assert waited - begun > 0.05


def three_collectives() -> tuple[float, list[CollectiveTimes]]:
    """The last one is waited for when something else is done."""
    x = torch.ones(1000)
    dist.barrier()
    with trace_collectives() as traced:
        start = time.perf_counter()
        dist.all_reduce(x)
        time.sleep(0.2 * dist.get_rank())
        dist.all_to_all_single(torch.empty(1000), x)
        work = dist.all_reduce(x, async_op=True)
        time.sleep(0.06)
        assert work is not None
        work.wait()
        seconds = time.perf_counter() - start
    dist.all_reduce(x)
    return seconds, traced


def test_a_line_for_each_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    chosen = {name: LAYOUTS[name] for name in ("data", "expert_chunks")}
    lines = measure([*TINY_RUN, "model.kv_heads=4", "precision=fp32"], chosen, rounds=1, steps=1)
    assert [(line.layout, line.precision) for line in lines] == [("data", "fp32"), ("expert_chunks", "fp32")]
    for line in lines:
        assert line.loss_off < 1e-5
        assert line.computing + line.exchanging + line.waiting == pytest.approx(line.step)
        assert line.throughput == pytest.approx(line.one_process / line.step)
    assert table(lines).count("\n") == 3
    assert parse(["seed=3", "--layouts", "tensor"]).overrides == ["seed=3"]
