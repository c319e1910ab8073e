"""A training run: step, log, evaluate, checkpoint, stop."""

import contextlib
import sys
from collections.abc import Iterator
from contextlib import closing
from time import perf_counter

import torch

from ..data.stream.stop import DataStop
from ..moe.tokens import Place
from ..parallel.processes import is_first, join, leave, pick_device
from .config import Config
from .evaluate import Evaluation, evaluate_session
from .feed import as_rows, say_stop
from .reporter import Logged, Reporter, build_reporter, set_up_logging
from .schedule import learning_rate_factor
from .session import Session, open_session, save
from .step import Rows, StepNumbers
from .telemetry.watch import Watch


def run(config: Config) -> int:
    """Train to the end as one rank of the world in the environment. Returns the exit code."""
    device = pick_device(config.device.value)
    join(device, config.parallel.timeout_seconds)
    torch.manual_seed(config.seed)
    set_up_logging(is_first())
    code = 0
    try:
        try:
            session = open_session(config, device)
        except ValueError as error:
            return refuse(error)
        with closing(session.data.train), build_reporter(session) as reporter:
            try:
                evaluation = train(session, reporter)
            except DataStop as stop:
                evaluation, code = None, say_stop(stop, session.step)
                reporter.saved(save(session))
            reporter.finished(evaluation or evaluate_session(session))
        return code
    finally:
        leave()


def train(session: Session, reporter: Reporter) -> Evaluation | None:
    """All steps that are left, with a checkpoint and a validation after the last. None if no step was left."""
    config, evaluation = session.config, None
    session.parallel.model.train()
    stopwatch, watch = Stopwatch(), Watch(session)
    while session.step < config.steps:
        numbers, lr = next_step(session)
        watch.took(numbers)
        stopwatch.tokens += numbers.tokens
        validate, saves = due(session, config.evaluate.every), due(session, config.checkpoint.every)
        log = due(session, config.log.every) or validate or saves or watch.due()
        since = (*stopwatch.take(session.device), session.waiting.take()) if log else None
        with stopwatch.paused(session.device):
            evaluation = evaluate_session(session) if validate else None
            if since is not None:
                seen = watch.look(numbers, validated=validate, saves=saves)
                reporter.logged(session, Logged(numbers, lr, *since, evaluation, seen))
            if saves:
                reporter.saved(save(session))
    return evaluation


def next_step(session: Session) -> tuple[StepNumbers, float]:
    """One optimizer step; its numbers and its learning rate."""
    config = session.config
    lr = config.optimizer.lr * learning_rate_factor(config.schedule, session.step + 1, config.steps)
    rows = micro_batches(session)
    place = Place(config.seed, session.step + 1)
    numbers = session.engine.step(rows, lr, config.optimizer.clip_norm, place)
    session.step += 1
    session.tokens += numbers.tokens
    return numbers, lr


def micro_batches(session: Session) -> list[Rows]:
    """This rank's rows of the next global batch. Micro-step m of all ranks together is the m-th run of the global batch.

    Raises a DataStop, on all ranks, if there is none.
    """
    data, micro = session.parallel.mesh.data, session.micro
    together = micro * data.size
    starts = range(data.rank * micro, session.config.batch.sequences, together)
    with session.waiting:
        batches = [(session.data.train.batch(session.step, range(start, start + micro)), start) for start in starts]
    return [as_rows(batch, start, session.config, session.data, session.device) for batch, start in batches]


def due(session: Session, every: int) -> bool:
    """Every so many steps, and after the last."""
    return session.step == session.config.steps or (every > 0 and session.step % every == 0)


def refuse(error: ValueError) -> int:
    """What could not be refused before the ranks had met; all ranks come to the same error. Returns the exit code."""
    if is_first():
        print(f"tokenyard: {error}", file=sys.stderr)
    return 2


class Stopwatch:
    """Seconds and tokens of training since the last look; evaluation and checkpoints are not in it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.start = perf_counter()

    def take(self, device: torch.device) -> tuple[float, int]:
        """Seconds and tokens since the last call."""
        synchronise(device)
        seconds, tokens = perf_counter() - self.start, self.tokens
        self.start, self.tokens = perf_counter(), 0
        return seconds, tokens

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Leave out what happens inside."""
        begin = perf_counter()
        yield
        synchronise(device)
        self.start += perf_counter() - begin


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that the clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
