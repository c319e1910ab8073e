"""Checkpoints of a run while it trains: when they are due, what is in them, and what a failed one means."""

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
from .nonfinite import bad_state
from .session import Session
from .state import random_state


class SaveFailed(RuntimeError):
    """A checkpoint that the run cannot do without was not written; the same on every rank."""


def settled(session: Session, failed: bool, writing: bool) -> Iterator[Outcome]:
    """What became of the save under way, if it has ended; `failed` and `writing` are true if they are on any rank.

    Raises SaveFailed, after the Outcome, if it failed and checkpoint.on_failure=stop. Collective if it has ended.
    """
    yield from _told(session, session.saver.poll(failed, writing))


def finished(session: Session) -> Iterator[Outcome]:
    """What became of the save under way, once it has ended. Collective."""
    yield from _told(session, session.saver.wait(), may_stop=False)


def started(session: Session) -> Iterator[Outcome]:
    """Begin a save of this step; the Outcome of the one before, and of this one if it is waited for. Collective.

    Raises SaveFailed, after the Outcome, if one failed and checkpoint.on_failure=stop.
    """
    yield from _told(session, session.saver.wait())
    yield from _told(session, begin(session, session.config.checkpoint.asynchronous and not session.careful))


def conclude(session: Session) -> Iterator[Outcome]:
    """A durable checkpoint of this step: the one under way, or a new one. Collective.

    Raises SaveFailed, after the Outcome, if there is none.
    """
    yield from finished(session)
    if session.checkpoint != session.saver.path_of(session.step):
        outcome = begin(session, asynchronous=False)
        assert outcome is not None
        yield from _told(session, outcome, may_stop=False)
        if outcome.error is not None:
            raise SaveFailed(_words(outcome))


def save(session: Session) -> Path:
    """A durable checkpoint of this step. Collective. Raises SaveFailed."""
    for _ in conclude(session):
        pass
    assert session.checkpoint is not None
    return session.checkpoint


def begin(session: Session, asynchronous: bool) -> Outcome | None:
    """None if the save goes on beside the training. RunStop, and no save, if a weight or a moment is not finite."""
    held = session.engine.held()
    refuse_bad(session, held)
    state = held | random_state()
    saver, attach = session.saver, lambda path: session.data.tokenizer.save(path / "tokenizer")
    outcome = saver.start(session.step, state, facts_of(session), attach, asynchronous)
    return outcome or (None if asynchronous else saver.wait())


def refuse_bad(session: Session, held: dict[str, LocalShard]) -> None:
    """RunStop if a number of what would be saved is not finite. Collective."""
    bad = bad_state(session.parallel, held)
    if bad:
        text = f"{', '.join(bad)}: not finite after the update, so no checkpoint is written; the newest is {session.checkpoint}"
        raise RunStop(text, ExitCode.not_finite, saves=False)


def facts_of(session: Session) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: plain JSON."""
    identity, loss = session.folder / "run_id", session.validated.get(session.step)
    return {
        "config": session.shown,
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


def _told(session: Session, outcome: Outcome | None, may_stop: bool = True) -> Iterator[Outcome]:
    """The outcome, kept in mind."""
    if outcome is None:
        return
    session.careful = outcome.error is not None
    if outcome.error is None:
        session.checkpoint = outcome.path
    yield outcome
    if outcome.error is not None and may_stop and session.config.checkpoint.on_failure is OnFailure.stop:
        raise SaveFailed(_words(outcome))


def _words(outcome: Outcome) -> str:
    left = checkpoints_in(outcome.path.parent)
    return f"checkpoint {outcome.path} was not written: {outcome.error}; the newest there is: {left[0] if left else 'none'}"
