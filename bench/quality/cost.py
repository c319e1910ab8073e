"""The time of a variant's step relative to the dense model, and the loss of expert choice without looking ahead."""

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
    """Time per step of each variant over that of the dense model, for each round; the variants take turns in this process."""
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
    """Returns the validation loss of an expert-choice run when tokens choose their top_k experts, as they must in generation.

    Experts that choose among the tokens of a sequence see later tokens, so the loss of expert choice itself is too low.
    """
    session = open_for_evaluation(str(folder), [])
    session.config.model.moe.router.selection = Selection.top_k
    return evaluate_session(session).loss
