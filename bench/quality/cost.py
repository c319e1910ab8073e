"""What a variant's step and its causal loss are worth: time beside the dense model, and expert choice without a look ahead."""

import tempfile
from pathlib import Path
from time import perf_counter

import torch

from ...moe.config import Selection
from ...parallel.processes import pick_device
from ...train.compose import compose
from ...train.evaluate import evaluate_session
from ...train.load import open_for_evaluation
from ...train.run import single_step, synchronise
from ...train.session import Session, open_session
from .plan import DENSE, settings
from .runs import Lab


def relative_costs(lab: Lab, rounds: int, steps: int) -> dict[str, list[float]]:
    """Each variant's time a step over the dense one's: a ratio for each round, in which all take turns in this process."""
    torch.set_num_threads(lab.threads)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: _opened(lab, model, Path(folder) / name) for name, model in lab.variants.items()}
        names, taken = list(sessions), []
        for turn in range(-1, rounds):
            places = [(turn + place) % len(names) for place in range(len(names))]
            taken.append({names[place]: _seconds(sessions[names[place]], steps) for place in places})
        for session in sessions.values():
            session.close()
    # The first round warms up.
    return {name: [each[name] / each[DENSE] for each in taken[1:]] for name in names}


def _opened(lab: Lab, model: list[str], folder: Path) -> Session:
    config = compose([*settings(lab.size, model, lab.more), f"run.dir={folder}"])
    session = open_session(config, pick_device(config.device.value))
    session.parallel.model.train()
    return session


def _seconds(session: Session, steps: int) -> float:
    """Of a step, the mean of `steps`."""
    synchronise(session.device)
    start = perf_counter()
    for _ in range(steps):
        single_step(session)
    synchronise(session.device)
    return (perf_counter() - start) / steps


def causal_loss(folder: Path) -> float:
    """The validation loss of a run with expert choice when tokens choose their top_k experts, as they must when text is generated.

    Experts that choose among the tokens of a sequence see later ones, which its own loss profits from.
    """
    session = open_for_evaluation(str(folder), [])
    session.config.model.moe.router.selection = Selection.top_k
    return evaluate_session(session).loss
