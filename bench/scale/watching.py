"""Counts the calls of the watchdogs and the cost of the statistics: `python -m tokenyard.bench.scale.watching [RANKS]`.

The watchdogs of all ranks run in one process, on hosts of 8, against a clock of their own; each call to a file is counted. The
statistics are those of 61 layers of 256 experts: the tensors and records of the real code, whose collectives are counted.
"""

import argparse
import io
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from heapq import heapify, heappop, heappush
from pathlib import Path
from time import process_time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ...moe.router_metrics import SUMS
from ...parallel.mesh import Axis
from ...train import step as step_module
from ...train.config.config import Config
from ...train.fault_tolerance import notices as notices_module
from ...train.fault_tolerance.hang_diagnosis import HangDiagnosis, Position
from ...train.fault_tolerance.notices import Notices
from ...train.logging.expert_stats import routing_probe, weight_stats
from ...train.logging.expert_stats.alerts import Alerts
from ...train.logging.expert_stats.collector import telemetry_sums
from ...train.logging.journal import Journal
from ...train.loss import LAYER_FIELDS, Losses, Totals
from ...train.step_flags import RankFlags

HOST, TICK = 8, 2.0
"""Ranks of a host; seconds between looks at the run folder, for the default timeout."""
CALLS = ("stat", "open", "utime", "mkdir", "link", "rename", "replace", "unlink", "listdir", "scandir")
LAYERS, EXPERTS, SEQUENCE = 61, 256, 4096
LINK, DISK, EVALUATION = 50e9, 1e9, 250
"""Bytes per second of a link and of the run folder; steps between evaluations."""
REPEATS = 15
"""Times that a record is written."""


def figures(world: int) -> dict[str, float]:
    """Returns the figures for this many ranks. Shares are of a step of one second."""
    return watching(world) | telemetry(world)


# The watchdogs.


@contextmanager
def counted(counts: Counter[str], shared: Path) -> Iterator[None]:
    """Counts calls to files: `shared` below this folder, `memory` elsewhere."""

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(path: Any, *arguments: Any, **options: Any) -> Any:
            counts["shared" if str(path).startswith(str(shared)) else "memory"] += 1
            return call(path, *arguments, **options)

        return count

    with ExitStack() as stack:
        for module, name in [*((os, name) for name in CALLS), (io, "open")]:
            stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name))))
        yield


def watching(world: int) -> dict[str, float]:
    """Returns calls in normal operation, and those of a hang in which rank 0 is frozen and the last rank is busy elsewhere."""
    with tempfile.TemporaryDirectory() as folder:
        shared, clock, counts = Path(folder) / "run", SimpleNamespace(now=1000.0), Counter[str]()
        shared.mkdir()
        ranks = [_notices(Path(folder), rank, world, clock) for rank in range(world)]
        with counted(counts, shared):
            _run([_looking(ranks, rank) for rank in range(world)], clock, 10 * TICK)
            calm = {place: counts[place] / (10 * TICK) for place in ("shared", "memory")}
            counts.clear()
            answers = dict[int, HangDiagnosis | None]()
            alive = [_watching(ranks, rank, clock.now + 0.1, answers, clock) for rank in range(1, world)]
            begin = clock.now
            _run(alive, clock, math.inf)
        right = sum(found is not None and found.ranks == [0] for found in answers.values())
        return {
            "calls to the run folder, all ranks (1/s)": calm["shared"],
            "calls to the run folder, a rank (1/s)": calm["shared"] / world,
            "calls to memory, a rank (1/s)": calm["memory"] / world,
            "calls to the run folder in a hang, all ranks": float(counts["shared"]),
            "calls to the run folder in a hang, a rank": counts["shared"] / world,
            "seconds of a hang from the limit to the end": clock.now - begin,
            "ranks with the right diagnosis": float(right),
        }


def _notices(folder: Path, rank: int, world: int, clock: SimpleNamespace) -> Notices:
    memory = folder / f"memory{rank // HOST}"
    memory.mkdir(exist_ok=True)
    with mock.patch.dict(os.environ, LOCAL_RANK=str(rank % HOST)), mock.patch.object(notices_module, "MEMORY", memory):
        return Notices(folder / "run", rank, world, TICK, "start", lambda: clock.now)


def _looking(ranks: list[Notices], rank: int) -> Generator[float]:
    yield TICK / 4 * ((rank * 0.618) % 1)  # no two begin at once
    while True:
        assert ranks[rank].look() is None
        yield TICK / 4


def _watching(
    ranks: list[Notices], rank: int, limit: float, answers: dict[int, HangDiagnosis | None], clock: SimpleNamespace
) -> Generator[float]:
    """What watchdog.py does from the begin of a collective that the ranks but the first and the last wait in until `limit`."""
    busy = rank == len(ranks) - 1
    yield TICK / 4 * ((rank * 0.618) % 1)
    while ranks[rank].look() is None and (busy or clock.now < limit):
        yield TICK / 4
    mine = Position(rank, 7, "forward", 3, None if busy else "all_reduce", 9, 600.0, "start")
    ranks[rank].put(mine)
    answers[rank] = (yield from ranks[rank].settle(mine)).diagnosis
    ranks[rank].close()


def _run(processes: list[Generator[float]], clock: SimpleNamespace, seconds: float) -> None:
    """Runs the processes, which yield how long they wait, side by side until `seconds` have passed or all have ended."""
    queue, end = [(clock.now, index) for index in range(len(processes))], clock.now + seconds
    heapify(queue)
    while queue and queue[0][0] <= end:
        clock.now, index = heappop(queue)
        wait = next(processes[index], None)
        if wait is not None:
            heappush(queue, (clock.now + wait, index))


# The statistics of the experts.


def telemetry(world: int) -> dict[str, float]:
    """Returns what the statistics send and write, by the default intervals, and the time of the host of rank 0."""
    sent = Counter[str]()
    parallel = _parallel(world)
    step_bytes = _sent_in(sent, "step", lambda: _step_numbers(parallel, world))
    record_bytes = _sent_in(sent, "record", lambda: weight_stats.gradient_norms(parallel, list(range(LAYERS)), 1.0))
    results: dict[str, Any] = {}
    probe_bytes = _sent_in(sent, "probe", lambda: results.update(_probe(parallel)))
    every, logged = Config().telemetry.every, 10
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / "telemetry.jsonl")
        tensors, alerts = _tensors(), Alerts(8)
        record_file, record_seconds = _written(
            journal, lambda: {"layers": [*range(LAYERS)], **telemetry_sums(tensors)}, alerts.check
        )
        probe_file, probe_seconds = _written(journal, lambda: results, lambda _: ())
        journal.close()
    peaks = LAYERS * 2 * 8
    link = 2 * (step_bytes + peaks / logged + record_bytes / every + probe_bytes / EVALUATION) / LINK  # an all-reduce sends twice
    host = record_seconds / every + probe_seconds / EVALUATION
    disk = (record_file / every + probe_file / EVALUATION) / DISK
    return {
        "bytes all-reduced a step": float(step_bytes),
        "bytes all-reduced a record": float(record_bytes + peaks),
        "bytes all-reduced a probe": float(probe_bytes),
        "bytes of a record": float(record_file),
        "bytes of a probe": float(probe_file),
        "share of the link (%)": 100 * link,
        "share of the run folder (%)": 100 * disk,
        **{
            f"share of rank 0's host, {name} (%)": 100 * share
            for name, share in zip(("least", "median", "most"), host.tolist(), strict=True)
        },
    }


def _parallel(world: int) -> Any:
    """As much of a Parallel as the statistics use: rank 0 of `world`, all of them data ranks, without communication."""
    one, many = Axis(1, 0, None), Axis(world, 0, None)
    mesh = SimpleNamespace(rank=0, world=world, everyone=many, data=many, stage=many, sequence=one, context=one, tensor=one)
    config = Config()
    config.model.layers, config.model.moe.experts, config.model.width, config.model.moe.hidden = LAYERS, EXPERTS, 7168, 2048
    model = SimpleNamespace(config=config.model)
    return SimpleNamespace(mesh=mesh, model=model, parameters={}, pipeline=None, device=torch.device("cpu"), overflow=None)


def _sent_in(sent: Counter[str], what: str, work: Callable[[], Any]) -> int:
    """Returns the bytes that `work` gives to all-reduces."""

    def count(x: Tensor, axis: Axis) -> Tensor:
        sent[what] += x.numel() * x.element_size()
        return x

    with ExitStack() as stack:
        for module in (step_module, weight_stats, routing_probe):
            stack.enter_context(mock.patch.object(module, "sum_over", count))
        work()
    return sent[what]


def _step_numbers(parallel: Any, world: int) -> None:
    """One step in which the ranks also report their seconds."""
    per_layer = {name: torch.zeros(LAYERS, dtype=torch.float64) for name in LAYER_FIELDS}
    zero = torch.zeros((), dtype=torch.float64)
    share = Losses(zero, zero, counts_LE=torch.zeros(LAYERS, EXPERTS, dtype=torch.int64), **per_layer)
    share = share._replace(router_metrics_LG=torch.zeros(LAYERS, len(SUMS), dtype=torch.float64), logit_max_L=torch.zeros(LAYERS))
    step_module.add_up(parallel, [share], Totals(1, 1, 1), zero, RankFlags(seconds=0.1))


def _probe(parallel: Any) -> dict[str, Any]:
    """The second probe of a run, of rows of SEQUENCE tokens."""
    config, draw = Config(model=parallel.model.config), torch.Generator().manual_seed(0)
    validation, tokenizer = SimpleNamespace(source_names=["all"]), SimpleNamespace(decode=lambda ids: f"word{ids[0]}")
    data = SimpleNamespace(validation=validation, tokenizer=tokenizer)
    session: Any = SimpleNamespace(config=config, parallel=parallel, data=data)
    probe = routing_probe.Probe(session, list(range(LAYERS)))
    chosen = torch.rand(LAYERS, SEQUENCE, EXPERTS, generator=draw).topk(8).indices.short()
    ids = torch.randint(1000, (SEQUENCE,), generator=draw)
    probe.route = lambda: routing_probe.Routed(chosen, ids, torch.zeros_like(ids))
    probe.last = chosen
    alike = weight_stats.similarity(parallel, list(range(LAYERS)), probe.picked)
    random = {layer: torch.rand(EXPERTS, EXPERTS, generator=draw).double().round(decimals=4) for layer in alike}
    return probe.run() | {"similarity": {str(layer): random_EE for layer, random_EE in random.items()}}


def _tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = (LAYERS, EXPERTS)
    return {
        "counts_LE": torch.randint(10**6, shape, generator=draw),
        "dropped_L": torch.zeros(LAYERS, dtype=torch.int64),
        "router_metrics_LG": torch.rand(LAYERS, len(SUMS), dtype=torch.float64, generator=draw),
        "dead_LE": torch.zeros(shape, dtype=torch.bool),
        "bias_LE": torch.randn(shape, generator=draw) / 1000,
        "grad_norm_LE": torch.rand(shape, dtype=torch.float64, generator=draw),
    }


def _written(
    journal: Journal, make: Callable[[], dict[str, Any]], check: Callable[[dict[str, Any]], Iterable[Any]]
) -> tuple[int, np.ndarray]:
    """Returns the bytes of a record in the journal, and processor seconds to make, check and write it: least, median, most."""
    seconds = []
    before = journal.path.stat().st_size
    for _ in range(REPEATS):
        begin = process_time()
        record = make()
        journal.write(record)
        list(check(record))
        seconds.append(process_time() - begin)
    return (journal.path.stat().st_size - before) // REPEATS, np.percentile(seconds, (0, 50, 100))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.scale.watching", description=__doc__)
    parser.add_argument("ranks", nargs="?", type=int, default=2048)
    return parser.parse_args(words)


def main() -> None:
    for name, value in figures(parse().ranks).items():
        print(f"{name:<56} {value:>16,.4f}")


if __name__ == "__main__":
    main()
