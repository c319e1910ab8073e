"""Compares two ranks of one thread with one process of two threads: `python -m tokenyard.bench.ranks [key=value ...]`.

Steps are whole training steps of `tokenyard train`, with the same global batch. All layouts take turns: a round has the same number
of steps of the one process and of each layout, and the other processes sleep. The step of a rank is split into computing,
exchanging (in collectives that both ranks have started) and waiting for the other rank.
"""

import argparse
import json
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from ..parallel.process_group import wait_for_all
from ..train.config.compose import compose
from ..train.run import single_step
from ..train.session import Session
from ..train.setup import open_session
from .comm_trace import Split, split_times, trace_collectives
from .rank_processes import RankProcesses, join
from .timing import markdown, rotated, spread

RUN = [
    "tracker=jsonl",
    "sequence_length=512",
    "batch.sequences=8",
    "model.width=512",
    "model.heads=8",
    "model.kv_heads=8",
    "model.moe.hidden=1024",
]
"""4 layers, 8 experts top-2 and a vocabulary of 8192 are the default."""

LAYOUTS = {
    "data": [],
    "fsdp": ["parallel.shard=2"],
    "expert": ["parallel.expert=2"],
    "expert_chunks": ["parallel.expert=2", "parallel.overlap_chunks=2"],
    "tensor": ["parallel.tensor=2"],
    "context": ["parallel.context=2"],
    "context_heads": ["parallel.context=2", "parallel.context_exchange=heads"],
    "pipeline": ["parallel.pipeline=2", "batch.micro=1"],
    "pipeline_interleaved": ["parallel.pipeline=2", "parallel.pipeline_schedule=interleaved", "batch.micro=1"],
}
"""Layouts of the two ranks. Chunks overlap the exchange of rows with the experts; FSDP2 overlaps its all-gathers with the
layers. A pipeline passes 8 micro-batches, and idles for 1/8 of its work, interleaved for 1/16."""


class Turn(NamedTuple):
    """The steps of one side in a round, as means over the steps."""

    seconds: float
    split: Split
    loss: float
    """The loss of the last step."""


class LayoutResult(NamedTuple):
    """Results of one layout. Seconds are of a step, medians over the rounds."""

    layout: str
    precision: str
    throughput: float
    """Ratio to the throughput of the one process, the median over the rounds."""
    least: float
    most: float
    one_process: float
    step: float
    computing: float
    exchanging: float
    waiting: float
    loss_off: float
    """Largest relative difference of the loss from that of the one process."""


def main() -> None:
    arguments = parse()
    if arguments.rank:
        serve(arguments.rank)
        return
    chosen = {name: LAYOUTS[name] for name in arguments.layouts}
    lines = []
    for precision in arguments.precisions:
        lines += measure([*arguments.overrides, f"precision={precision}"], chosen, arguments.rounds, arguments.steps)
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.ranks", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of the run, as model.moe.experts=16")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="of each side in a round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(overrides: list[str], layouts: dict[str, list[str]], rounds: int, steps: int) -> list[LayoutResult]:
    """Measures each layout in one precision."""
    overrides = [*RUN, *overrides]
    module = "tokenyard.bench.ranks"
    with ExitStack() as stack:
        # Started one after the other: the first creates the tokenizer and the tokens for both.
        alone = stack.enter_context(RankProcesses(module, 1, 2, {"overrides": overrides, "layouts": {"one process": []}}))
        ranks = stack.enter_context(RankProcesses(module, 2, 1, {"overrides": overrides, "layouts": layouts}))
        sides = {"one process": alone} | dict.fromkeys(layouts, ranks)
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        for round_ in range(-1, rounds):
            for name in rotated(list(sides), round_):
                turn = mean_turn(sides[name].ask({"layout": name, "steps": steps}))
                # The first round warms up.
                turns[name] += [turn] if round_ >= 0 else []
    precision = str(compose(overrides).precision.value)
    return [_line(name, precision, turns[name], turns["one process"]) for name in layouts]


def mean_turn(answers: list[dict[str, Any]]) -> Turn:
    """Returns the mean over the processes of a side, from their answers."""
    splits = split_times([answer["seconds"] for answer in answers], [answer["collectives"] for answer in answers])
    mean = Split(*(statistics.fmean(values) for values in zip(*splits, strict=True)))
    steps = answers[0]["steps"]
    return Turn(sum(mean) / steps, Split(*(value / steps for value in mean)), answers[0]["loss"])


def serve(folder: Path) -> None:
    """One process of a side: opens a session for each layout, and takes steps on request."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    task = join(folder)
    sessions = {name: _session(task, words, str(index)) for index, (name, words) in enumerate(task["layouts"].items())}
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        call = json.loads(line)
        print(json.dumps(steps_of(sessions[call["layout"]], call["steps"])), file=answers)


def steps_of(session: Session, steps: int) -> dict[str, Any]:
    """Takes `steps` training steps. Returns their seconds from a barrier on, the times of their collectives, and the last loss."""
    wait_for_all()
    numbers = None
    with trace_collectives() as traced:
        begin = perf_counter()
        for _ in range(steps):
            numbers = single_step(session)
        seconds = perf_counter() - begin
    assert numbers is not None
    return {"seconds": seconds, "steps": steps, "collectives": list(traced), "loss": numbers.global_flags.loss}


def _session(task: dict[str, Any], layout: list[str], name: str) -> Session:
    words = [*task["overrides"], *layout, f"run.dir={task['folder']}/{name}"]
    session = open_session(compose(words), torch.device("cpu"))
    session.parallel.model.train()
    return session


def _line(name: str, precision: str, turns: list[Turn], alone: list[Turn]) -> LayoutResult:
    ratios = [one.seconds / many.seconds for one, many in zip(alone, turns, strict=True)]
    off = max(abs(many.loss / one.loss - 1) for one, many in zip(alone, turns, strict=True))
    split = Split(*(statistics.median(values) for values in zip(*(turn.split for turn in turns), strict=True)))
    step, one_process = (statistics.median(turn.seconds for turn in side) for side in (turns, alone))
    return LayoutResult(name, precision, *spread(ratios), one_process, step, *split, off)


def table(lines: list[LayoutResult]) -> str:
    """Returns a Markdown table. Shares are relative to the step of the layout."""
    heads = ["precision", "2 ranks x 1 thread", "throughput (least, most)", "step s", "1 x 2 step s"]
    heads += ["computing", "exchanging", "waiting", "loss off by"]
    return markdown(heads, map(_cells, lines))


def _cells(line: LayoutResult) -> list[str]:
    ratio = f"{line.throughput:.2f} ({line.least:.2f}, {line.most:.2f})"
    shares = [f"{part / line.step:.1%}" for part in (line.computing, line.exchanging, line.waiting)]
    return [line.precision, line.layout, ratio, f"{line.step:.3f}", f"{line.one_process:.3f}", *shares, f"{line.loss_off:.0e}"]


if __name__ == "__main__":
    main()
