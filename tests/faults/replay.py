"""make replay: a run under the launcher, a rank of which is killed at seeded instants, and the productive share of its time.

The time from one failure to the next is exponential, as of a machine that does not age; of the seed 11 as many come as the mean
says. Exit code 1 below `--target`.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fault_run import Launched, events_of
from tokenyard.train.logging.goodput import in_words
from tokenyard.train.logging.journal import read_journal

RUN = ["steps=1000000", "schedule=constant", "checkpoint.every=40", "evaluate.every=0", "launch.max_restarts=1000"]
"""The default model and data. Evaluation is left out: it would not count as productive, and has nothing to do with failures."""


def main(argv: list[str] | None = None) -> int:
    wish = arguments(argv)
    instants = failures(wish.seed, 60 * wish.mean, 60 * wish.minutes)
    print(f"{wish.minutes:g} minutes, killed after {', '.join(f'{at:.0f} s' for at in instants)}", flush=True)
    folder = Path(wish.folder or tempfile.mkdtemp(prefix="replay-")) / "run"
    words = [*RUN, f"data.cache={wish.cache}"] if wish.cache else RUN
    with Launched(folder, *words, tiny=False) as run:
        replay(run, instants, 60 * wish.minutes, random.Random(wish.seed))
        (folder / "stop").touch()
        assert run.wait(300) == 0, run.output()
    (*_, last) = events_of(folder, "accounting")
    print("\n".join([in_words(last), *balance(folder, last, len(instants))]))
    return 0 if last["productive"] >= wish.target else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("replay", description="The share of productive time of a run with failures.")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the run (%(default)s)")
    parser.add_argument("--mean", type=float, default=15.0, help="minutes between failures (%(default)s)")
    parser.add_argument("--seed", type=int, default=11, help="of the failures (%(default)s)")
    parser.add_argument("--target", type=float, default=0.97, help="share that must be reached (%(default)s)")
    parser.add_argument("--folder", help="that keeps the run; a temporary one without")
    parser.add_argument("--cache", help="data.cache; the project's own without")
    return parser.parse_args(argv)


def failures(seed: int, mean: float, end: float) -> list[float]:
    """Instants, in seconds, before `end`."""
    draw, instants = random.Random(seed), []
    at = draw.expovariate(1 / mean)
    while at < end:
        instants.append(at)
        at += draw.expovariate(1 / mean)
    return instants


def replay(run: Launched, instants: list[float], end: float, draw: random.Random) -> None:
    """kill -9 of a drawn rank at each instant since the call; returns at the end."""
    begin = time.monotonic()
    for at in instants:
        idle(run, begin + at)
        ranks = run.ranks()
        victim = draw.randrange(len(ranks))
        print(f"{time.monotonic() - begin:.0f} s: kill -9 of rank {victim}", flush=True)
        os.kill(ranks[victim], signal.SIGKILL)
    idle(run, begin + end)


def idle(run: Launched, until: float) -> None:
    """AssertionError if the run ends."""
    while time.monotonic() < until:
        assert run.process.poll() is None, run.output()
        time.sleep(0.1)


def balance(folder: Path, last: dict[str, Any], killed: int) -> list[str]:
    """What the seconds that were not productive are made of, beside what the formula of docs/faults.md makes of them."""
    seconds, starts = last["seconds"], last["restarts"] + 1
    total, saves = sum(seconds.values()), len(events_of(folder, "checkpoint"))
    records = read_journal(folder / "metrics.jsonl")
    start, lost = seconds["startup"] / starts, seconds["lost"] / max(1, killed)
    blocked, between = seconds["checkpoint"] / max(1, saves), total / max(1, saves)
    foreseen = 1 - (start * starts + lost * killed) / total - blocked / between
    spare = 0.03 - blocked / between
    needed = f"needs a failure each {(start + lost) / spare / 60:.0f} minutes, or rarer" if spare > 0 else "needs rarer checkpoints"
    return [
        f"{killed} failures, {starts} starts, {records[-1]['step']} steps, {saves} checkpoints in {total:.0f} s",
        f"a start {start:.1f} s; a failure lost {lost:.1f} s; a checkpoint each {between:.1f} s blocked for {blocked:.3f} s",
        f"by the formula {foreseen:.1%}; 97 % of an endless run like this one {needed}",
    ]


if __name__ == "__main__":
    sys.exit(main())
