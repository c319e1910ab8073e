"""What a step with Muon takes over one with AdamW, by tokens of a step: `python -m tokenyard.bench.update_share [key=value ...]`.

Both take turns on the default model, with one thread. Its processor time counts, which depends less on other processes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ..parity.observe import random_batch, rows_of
from ..train.config.compose import compose
from ..train.config.matrices import by_muon, matrices, newton_schulz_flops
from ..train.derive import derive
from ..train.optimizer import build_optimizer
from ..train.setup import build_parallel
from ..train.step import StepInput, train_step
from .timing import markdown, ratio, spread

SEQUENCES = (16, 64, 128)
ROUNDS = 7
OPTIMIZERS = ("adamw", "muon")
VOCABULARY = 8192


def step_of(optimizer: str, sequences: int, words: Sequence[str]) -> Callable[[], object]:
    """Returns a step of the model on random tokens."""
    config = compose(
        [*words, f"optimizer={optimizer}", f"batch.sequences={sequences}", f"model.vocabulary={VOCABULARY}", "tracker=none"]
    )
    derive(config, torch.device("cpu"))
    parallel = build_parallel(config, torch.device("cpu"))
    rows = rows_of(parallel, config, *random_batch(config, 0))
    updater = build_optimizer(config.optimizer, parallel)
    return lambda: train_step(parallel, updater, StepInput(rows, 1e-4, 1.0))


def flops(words: Sequence[str]) -> int:
    """Returns those of all matrices of a step."""
    config = compose([*words, "optimizer=muon", f"model.vocabulary={VOCABULARY}"])
    derive(config, torch.device("cpu"))
    parallel, muon = build_parallel(config, torch.device("cpu")), config.optimizer.muon
    shapes = {name: one.metadata.shape for name, one in parallel.parameters.items() if by_muon(name, one.metadata.shape, muon)}
    own = (matrix for name, shape in shapes.items() for matrix in matrices(name, shape, config.model, muon))
    return sum(newton_schulz_flops(matrix.shape) for matrix in own)


def seconds(step: Callable[[], object]) -> float:
    begin = time.thread_time()
    step()
    return time.thread_time() - begin


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.update_share", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="settings of the model, as for tokenyard train")
    parser.add_argument("--sequences", nargs="+", type=int, default=SEQUENCES, help="of a step")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    return parser.parse_intermixed_args(words)


def main() -> None:
    arguments = parse()
    words = arguments.overrides
    torch.set_num_threads(1)
    print(f"products of Muon: {flops(words) / 1e9:.1f} GFLOP a step")
    rows = list[list[str]]()
    for sequences in arguments.sequences:
        steps = {name: step_of(name, sequences, words) for name in OPTIMIZERS}
        taken: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
        for turn in range(arguments.rounds + 1):
            for name, step in steps.items():
                second = seconds(step)
                if turn:
                    taken[name].append(second)
        adamw, muon = (spread(taken[name]) for name in OPTIMIZERS)
        shown = [f"{1e3 * each.median:.0f} ({1e3 * each.least:.0f}-{1e3 * each.most:.0f})" for each in (adamw, muon)]
        extra = statistics.median(taken["muon"]) - statistics.median(taken["adamw"])
        rows.append([str(sequences), *shown, f"{1e3 * extra:.0f}", str(ratio(taken["muon"], taken["adamw"]))])
    print(markdown(["sequences", "AdamW ms", "Muon ms", "more, ms", "ratio, by turns"], rows))


if __name__ == "__main__":
    main()
