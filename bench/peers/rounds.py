"""Measures all sides of a case in turns: in each round every side takes the same number of steps, in a random order."""

import json
import os
import random
import statistics
import sys
import time
from dataclasses import asdict
from typing import NamedTuple

from ...train.allocator import SETTINGS
from ..rank_processes import JsonWorker
from ..timing import ratio
from .cases import IMPORTS, Case, Side, groups, not_installed, refusal

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Limits of the relative difference between first losses. In bf16 some sides route by bf16 logits, which changes a few choices."""


class Measurement(NamedTuple):
    """The parameters of a measurement."""

    rounds: int = 7
    steps: int = 1
    """Steps of each side in a round."""
    warmup: int = 2
    """Steps of each side before the first round."""
    threads: int = 2
    together: int = 5
    """Sides in memory at once."""
    kept_memory: bool = True
    """Whether each side has the memory settings of `tokenyard train`."""


class SideResult(NamedTuple):
    """Results of one side. A ratio of tokens/s is the median over the rounds of the ratio within a round."""

    case: str
    side: str
    tokens_per_second: float | None = None
    of_dense: float | None = None
    quartiles: tuple[float, float] | None = None
    """Quartiles of `of_dense`."""
    ours_is_faster: float | None = None
    """Tokens/s of our side that does the same work, over tokens/s of this side."""
    peak_bytes: int | None = None
    """Peak resident memory in any step, without the imported libraries."""
    first_loss: float | None = None
    same: bool | None = None
    """Whether the first loss equals that of our side."""
    note: str = ""


class Worker:
    """The process of a side, which waits for its turn."""

    def __init__(self, side: Side, case: Case, plan: Measurement) -> None:
        self.side = side
        task = {
            "case": asdict(case),
            "builder": side.builder,
            "variant": side.variant,
            "threads": plan.threads,
            "imports": IMPORTS.get(side.needs or "", "torch"),
        }
        environment = {"OMP_NUM_THREADS": str(plan.threads)} | (SETTINGS if plan.kept_memory else {})
        self.process = JsonWorker(side.name, ["tokenyard.bench.peers.worker", json.dumps(task)], environment)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak = 0

    def ready(self) -> str | None:
        """Waits until the model is built. Returns None, or what is not installed."""
        return not_installed(self.side) if "missing" in self.process.answer() else None

    def steps(self, count: int, timed: bool = True) -> None:
        self.process.ask(count)
        answer = self.process.answer()
        self.losses += answer["losses"]
        self.peak = answer["peak"]
        if timed:
            self.seconds.append(answer["seconds"] / count)


def measure(name: str, case: Case, sides: list[Side], plan: Measurement) -> list[SideResult]:
    """Results of the sides, in their order. Raises RuntimeError if a side fails, or if losses that must be equal are not."""
    refused = {side: words for side in sides if (words := refusal(side, case, _available()))}
    lines = {side: SideResult(name, side.name, note=words) for side, words in refused.items()}
    for group in groups([side for side in sides if side not in refused], plan.together):
        workers = [Worker(side, case, plan) for side in group]
        try:
            missing = {worker.side: words for worker in workers if (words := worker.ready())}
            lines |= {side: SideResult(name, side.name, note=words) for side, words in missing.items()}
            there = [worker for worker in workers if worker.side not in missing]
            _take_turns(name, there, plan)
            by_name = {worker.side.name: worker for worker in there}
            lines = {worker.side: _line(name, worker, by_name, case) for worker in there} | lines
        finally:
            for worker in workers:
                worker.process.close()
    return [lines[side] for side in sides]


def _take_turns(name: str, workers: list[Worker], plan: Measurement) -> None:
    for worker in workers:
        worker.steps(plan.warmup, timed=False)
    order, chance = list(workers), random.Random(0)
    for turn in range(plan.rounds):
        chance.shuffle(order)
        for worker in order:
            time.sleep(0.02)  # until the threads of the previous worker sleep
            worker.steps(plan.steps)
        seconds = ", ".join(f"{worker.side.name} {worker.seconds[-1]:.2f}" for worker in workers)
        print(f"{name} round {turn + 1} of {plan.rounds}, seconds a step: {seconds}", file=sys.stderr)


def _line(name: str, worker: Worker, workers: dict[str, Worker], case: Case) -> SideResult:
    side = worker.side
    of_dense = ratio(workers[side.dense].seconds, worker.seconds)
    ours = workers.get(side.ours)
    seconds = statistics.median(worker.seconds)
    return SideResult(
        name,
        side.name,
        case.tokens / seconds,
        of_dense.median,
        (of_dense.low, of_dense.high),
        ratio(worker.seconds, ours.seconds).median if ours else None,
        worker.peak,
        worker.losses[0],
        _same(worker, ours, case) if side.same and ours else None,
    )


def _same(worker: Worker, ours: Worker, case: Case) -> bool:
    mine, reference = worker.losses[0], ours.losses[0]
    if abs(mine / reference - 1) > TOLERANCE[case.precision]:
        raise RuntimeError(f"{worker.side.name} begins with a loss of {mine}, {ours.side.name} with {reference}: not the same work")
    return True


def _available() -> int:
    """Bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
