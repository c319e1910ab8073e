"""What a variant's step and its causal loss are worth: time beside the dense model, and expert choice without a look ahead."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from ...moe.config import Selection
from ...parallel.process_group import pick_device
from ...train.config.compose import compose
from ...train.evaluation import evaluate_session
from ...train.load import open_for_evaluation
from ...train.run import single_step
from ...train.session import Session
from ...train.setup import open_session
from ..timing import take_turns
from .plan import DENSE, settings
from .runs import Lab


def relative_costs(lab: Lab, rounds: int, steps: int) -> dict[str, list[float]]:
    """Each variant's time a step over the dense one's: a ratio for each round, in which all take turns in this process."""
    torch.set_num_threads(lab.threads)
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: _opened(lab, model, Path(folder) / name) for name, model in lab.variants.items()}
        device = sessions[DENSE].device
        taken = take_turns({name: partial(_take, session, steps) for name, session in sessions.items()}, device, rounds)
        for session in sessions.values():
            session.close()
    return {name: [own / dense for own, dense in zip(seconds, taken[DENSE], strict=True)] for name, seconds in taken.items()}


def _opened(lab: Lab, model: list[str], folder: Path) -> Session:
    config = compose([*settings(lab.size, model, lab.more), f"run.dir={folder}"])
    session = open_session(config, pick_device(config.device.value))
    session.parallel.model.train()
    return session


def _take(session: Session, steps: int) -> None:
    for _ in range(steps):
        single_step(session)


def causal_loss(folder: Path) -> float:
    """The validation loss of a run with expert choice when tokens choose their top_k experts, as they must when text is generated.

    Experts that choose among the tokens of a sequence see later ones, which its own loss profits from.
    """
    session = open_for_evaluation(str(folder), [])
    session.config.model.moe.router.selection = Selection.top_k
    return evaluate_session(session).loss
