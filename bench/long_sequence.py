"""Measures the memory of context ranks: `python -m tokenyard.bench.long_sequence`.

Takes one training step on one long sequence, on 1, 2 and 4 ranks of one thread. Peaks are of a rank, above what the process has
before its step. For throughput see bench/ranks.py: `--layouts context sequence_length=4096 batch.sequences=2`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ..parallel.process_group import wait_for_all
from ..parity.observe import random_batch, rows_of
from ..train.config.compose import compose
from ..train.optimizer import build_optimizer
from ..train.setup import build_parallel
from ..train.step import StepInput, train_step
from .peers.worker import forget_peak, memory
from .rank_processes import RankProcesses, join
from .timing import markdown

MODULE = "tokenyard.bench.long_sequence"
MODEL = "model.layers=2 model.width=128 model.heads=1 model.kv_heads=1 model.head_width=32 model.vocabulary=512 model.moe.experts=4"
MIB = 2**20


class ContextResult(NamedTuple):
    """One number of ranks."""

    ranks: int
    peak: int
    """Bytes, of the rank that needs most."""
    seconds: float
    loss: float


def main() -> None:
    arguments = parse()
    if arguments.rank:
        serve(arguments.rank)
        return
    lines = [measure(ranks, arguments.length) for ranks in (1, 2, 4)]
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--length", type=int, default=32768, help="tokens of the sequence")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(ranks: int, length: int) -> ContextResult:
    """Takes the step on `ranks` fresh processes."""
    words = [*MODEL.split(), "model.moe.hidden=128", "batch.sequences=1", "precision=fp32"]
    words += [f"sequence_length={length}", f"parallel.context={ranks}"]
    with RankProcesses(MODULE, ranks, 1, {"overrides": words}) as processes:
        answers = processes.ask({})
    return ContextResult(ranks, max(answer["peak"] for answer in answers), answers[0]["seconds"], answers[0]["loss"])


def serve(folder: Path) -> None:
    """One rank: takes one step on request."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    config = compose(join(folder)["overrides"])
    parallel = build_parallel(config, torch.device("cpu"))
    optimizer = build_optimizer(config.optimizer, parallel)
    rows = rows_of(parallel, config, *random_batch(config, 0))
    print(json.dumps("ready"), file=answers)
    for _ in sys.stdin:
        print(json.dumps(_step(parallel, optimizer, StepInput(rows, 1e-3, 1.0))), file=answers)


def _step(parallel: Any, optimizer: Any, step_input: StepInput) -> dict[str, float]:
    forget_peak()
    before = memory("VmRSS")
    wait_for_all()
    begin = perf_counter()
    numbers = train_step(parallel, optimizer, step_input)
    seconds = perf_counter() - begin
    return {"peak": memory("VmHWM") - before, "seconds": seconds, "loss": numbers.global_flags.loss}


def table(lines: list[ContextResult]) -> str:
    """Returns a Markdown table."""
    heads = ["ranks", "peak of a rank, MiB", "share of one process", "step s", "loss off by"]
    rows = (
        [
            str(line.ranks),
            f"{line.peak / MIB:,.0f}",
            f"{line.peak / lines[0].peak:.2f}",
            f"{line.seconds:.1f}",
            f"{abs(line.loss / lines[0].loss - 1):.0e}",
        ]
        for line in lines
    )
    return markdown(heads, rows)


if __name__ == "__main__":
    main()
