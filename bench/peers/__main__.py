"""Compares one training step of tokenyard, of other systems, and of a dense model: `python -m tokenyard.bench.peers`.

Forward, backward and AdamW of the same transformer on the same tokens. Each side has a process of its own, and the sides take
turns. The upper bound is a dense transformer that computes as much for each token. To install the peers:
pip install 'tokenyard[peers]', then
pip install --no-deps torchtitan==0.3.0 spmd_types==0.2.3 triton (torchtitan requires an older datasets than tokenyard).
"""

import argparse
import json

from ..timing import markdown
from .cases import CASES, SIDES, sides_of
from .rounds import Measurement, SideResult, measure


def main() -> None:
    arguments = parse()
    plan = Measurement(
        arguments.rounds, arguments.steps, arguments.warmup, arguments.threads, arguments.together, not arguments.plain_memory
    )
    lines = []
    for name in arguments.cases:
        case = CASES[name]
        lines += measure(name, case, sides_of(case, arguments.sides), plan)
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.peers", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["8x2-fp32", "8x2-bf16", "64x8-bf16"], help="experts x top-k")
    names = [side.name for side in SIDES]
    parser.add_argument("--sides", nargs="+", choices=names, help="these, and the sides they are compared with (all)")
    parser.add_argument("--rounds", type=int, default=Measurement().rounds)
    parser.add_argument("--steps", type=int, default=Measurement().steps, help="of each side in a round")
    parser.add_argument("--warmup", type=int, default=Measurement().warmup, help="steps of each side before the first round")
    parser.add_argument("--threads", type=int, default=Measurement().threads, help="of each side; one works at a time")
    parser.add_argument("--together", type=int, default=Measurement().together, help="sides in memory at once")
    parser.add_argument("--plain-memory", action="store_true", help="without the memory settings of tokenyard train")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def table(lines: list[SideResult]) -> str:
    """Returns a Markdown table. `ours` is the ratio of tokenyard's tokens/s to those of the side."""
    heads = ["case", "side", "tokens/s", "of dense", "quartiles", "ours", "peak MiB", "first loss"]
    return markdown(heads, map(_cells, lines))


def _cells(line: SideResult) -> list[str]:
    if line.of_dense is None or line.quartiles is None:
        return [line.case, line.side, line.note, *[""] * 5]
    shares = [f"{line.of_dense:.2f}", "{:.2f}-{:.2f}".format(*line.quartiles)]
    shares.append("" if line.ours_is_faster is None else f"{line.ours_is_faster:.2f}")
    loss = f"{line.first_loss:.5f}{' =' if line.same else ''}"
    return [line.case, line.side, f"{line.tokens_per_second:.0f}", *shares, f"{(line.peak_bytes or 0) / 2**20:.0f}", loss]


if __name__ == "__main__":
    main()
