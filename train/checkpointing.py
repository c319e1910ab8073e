"""Saves checkpoints of a run while it trains: starts and polls a save, says what a checkpoint contains, and what a failure means.

The functions that save are generators of Outcomes, so that the caller logs each one before an error may end the run.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import checkpoints_in
from ..checkpoint.retention import LOSS
from ..checkpoint.saver import Outcome
from ..parallel.shard import LocalShard
from .config.config import OnFailure
from .exit import ExitCode, RunStop
from .session import Session
from .state import bad_state, random_state


class SaveFailed(RuntimeError):
    """A checkpoint that the run needs was not written; the same on every rank."""


def poll_save(session: Session, failed: bool, writing: bool) -> Iterator[Outcome]:
    """Yields the outcome of the save under way, if it has ended. Collective if it has.

    `failed`, `writing`: whether any rank has failed, or is writing. Raises SaveFailed if it failed and checkpoint.on_failure=stop.
    """
    yield from _record(session, session.saver.poll(failed, writing))


def wait_for_save(session: Session) -> Iterator[Outcome]:
    """Waits for the save under way and yields its outcome. Collective."""
    yield from _record(session, session.saver.wait(), may_stop=False)


def start_save(session: Session) -> Iterator[Outcome]:
    """Starts a save of this step. Yields the outcome of the one before, and of this one if it is synchronous. Collective.

    A save is synchronous without checkpoint.asynchronous, or after one that failed. Raises SaveFailed as `poll_save` does.
    """
    yield from _record(session, session.saver.wait())
    asynchronous = session.config.checkpoint.asynchronous and not session.last_save_failed
    yield from _record(session, write_checkpoint(session, asynchronous))


def save_and_wait(session: Session) -> Iterator[Outcome]:
    """Makes sure that a durable checkpoint of this step exists: the one under way, or a new one. Collective.

    Raises SaveFailed if it cannot be written.
    """
    yield from wait_for_save(session)
    if session.checkpoint != session.saver.path_of(session.step):
        outcome = write_checkpoint(session, asynchronous=False)
        assert outcome is not None
        yield from _record(session, outcome, may_stop=False)
        if outcome.error is not None:
            raise SaveFailed(_failure_text(outcome))


def save(session: Session) -> Path:
    """Returns the path of a durable checkpoint of this step. Collective. Raises SaveFailed if it cannot be written."""
    for _ in save_and_wait(session):
        pass
    assert session.checkpoint is not None
    return session.checkpoint


def write_checkpoint(session: Session, asynchronous: bool) -> Outcome | None:
    """Saves this step. Returns None if the save continues while the run trains. Collective.

    Raises RunStop, without a save, if a weight or a moment is not finite.
    """
    state = finite_state(session) | random_state()
    saver, attach = session.saver, lambda path: session.data.tokenizer.save(path / "tokenizer")
    outcome = saver.start(session.step, state, facts_of(session), attach, asynchronous)
    return outcome or (None if asynchronous else saver.wait())


def finite_state(session: Session) -> dict[str, LocalShard]:
    """Returns weights and moments to save. Collective. Raises RunStop if one of them is not finite."""
    held = session.engine.state_to_save()
    if bad := bad_state(session.parallel, held):
        text = f"{', '.join(bad)}: not finite after the update, so no checkpoint is written; the newest is {session.checkpoint}"
        raise RunStop(text, ExitCode.not_finite, saves=False)
    return held


def facts_of(session: Session) -> dict[str, Any]:
    """Returns what a checkpoint contains in addition to its tensors: plain JSON."""
    identity, loss = session.folder / "run_id", session.validation_loss.get(session.step)
    return {
        "config": session.shown_config,
        "step": session.step,
        "tokens": session.tokens,
        "ranks": session.parallel.mesh.world,
        "layout": session.parallel.mesh.sizes,
        "tokenizer_hash": session.data.facts.tokenizer_hash,
        "data_fingerprint": session.data.facts.train_fingerprint,
        "data_state": session.data.train.state(session.step),
        LOSS: loss if loss is not None and math.isfinite(loss) else None,
        "run_id": identity.read_text().strip() if identity.exists() else None,
        "extra": session.extra,
        "torch": torch.__version__,
        "host_cores": os.cpu_count(),
    }


def _record(session: Session, outcome: Outcome | None, may_stop: bool = True) -> Iterator[Outcome]:
    """Yields the outcome, if there is one, after recording it in the session."""
    if outcome is None:
        return
    session.last_save_failed = outcome.error is not None
    if outcome.error is None:
        session.checkpoint = outcome.path
    yield outcome
    if outcome.error is not None and may_stop and session.config.checkpoint.on_failure is OnFailure.stop:
        raise SaveFailed(_failure_text(outcome))


def _failure_text(outcome: Outcome) -> str:
    found = checkpoints_in(outcome.path.parent)
    return f"checkpoint {outcome.path} was not written: {outcome.error}; the newest there is: {found[0] if found else 'none'}"
