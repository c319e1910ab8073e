"""Before the first step: the largest batch forward and backward, a small checkpoint, the disk, the trackers.

What the run will need is found missing in its first minute and not in its third hour. Weights, moments, random state and the
position in the data are afterwards bit for bit what they were.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from ...checkpoint.store import load_checkpoint, save_checkpoint
from ...moe.token_info import BatchPosition
from ...parallel.object_collectives import from_all
from ...parallel.progress import PROGRESS, in_phase
from ...parallel.shard import LocalShard
from ..batch import Rows
from ..config.complain import say
from ..config.environment import restarted
from ..exit import ExitCode, RunStop, in_one_line, place
from ..logging.journal import Journal
from ..logging.run_logger import Reporter
from ..session import Session
from ..state import random_state, restore_random
from ..step import StepInput
from .failure_note import Failure, find_note, leave_note


@in_phase("dry step")
def dry_step(session: Session, reporter: Reporter) -> None:
    """RunStop, one line, for what is missing. By default one rank alone asks for room on the disk and no more. Collective."""
    wish = session.config.debug.dry_step
    if wish is None and session.parallel.mesh.world == 1:
        attempt(session, "the disk", try_disk)
    if not (session.parallel.mesh.world > 1 and not restarted() if wish is None else wish):
        return
    PROGRESS.step = session.step
    before = {name: LocalShard(piece, state.clone()) for name, (piece, state) in random_state().items()}
    for what, test in (("a step", try_step), ("a checkpoint", try_checkpoint), ("the disk", try_disk)):
        attempt(session, what, test)
    reporter.try_trackers()
    restore_random(before)
    reporter.event("dry_step", step=session.step)


def attempt(session: Session, what: str, test: Callable[[Session], None]) -> None:
    """All ranks fail if one does. In a step, and for want of memory, it fails while the others wait for it in a collective."""
    mine = ""
    try:
        test(session)
    except (OSError, ValueError, RuntimeError) as error:
        mine = in_one_line(error)
        if session.parallel.mesh.world > 1 and (test is try_step or isinstance(error, torch.OutOfMemoryError)):
            end_all(session, f"the dry step failed at {what} on {place()}: {mine}")
    failed = [(rank, text) for rank, text in enumerate(from_all(mine)) if text]
    if failed:
        rank, text = failed[0]
        raise RunStop(f"the dry step failed at {what} on rank {rank}: {text[:500]}", ExitCode.dry_step, saves=False)


def end_all(session: Session, text: str) -> None:
    """Ends this process, and the others by a note. What fails here as another rank has left says nothing."""
    folder, code = session.folder, int(ExitCode.dry_step)
    if find_note(folder) is None:
        say(text)
        with suppress(OSError):
            journal = Journal.appending(folder / "events.jsonl")
            journal.event("stopped", step=session.step, reason=text, code=code, checkpoint=str(session.checkpoint))
        leave_note(folder, Failure(session.parallel.mesh.rank, session.step, text, code))
    sys.stdout.flush()
    os._exit(code)


def try_step(session: Session) -> None:
    """All micro-batches of a step as large as they can be, in tokens that count, and the moments of AdamW; without the update."""
    session.engine.held()  # makes the moments
    micro, length = session.micro, session.config.sequence_length
    rows = session.config.batch.sequences // session.parallel.mesh.data.size // micro
    first = session.parallel.mesh.data.rank * micro
    batches = [made_up(session, micro, length, first) for _ in range(min(rows, 2))]
    clip_norm, position = session.config.optimizer.clip_norm, BatchPosition(session.config.seed, session.step + 1)
    session.engine.step(StepInput(batches, 0.0, clip_norm, position, accepts=lambda _: False))
    session.engine.optimizer.zero_grad(set_to_none=True)


def made_up(session: Session, sequences: int, length: int, first: int) -> Rows:
    """Rows of other tokens each, all of which count, drawn from a generator of their own."""
    draw = torch.Generator().manual_seed(first)
    ids_BS = torch.randint(session.data.tokenizer.size, (sequences, length), generator=draw).to(session.device)
    documents_BS = torch.zeros_like(ids_BS) if session.config.data.mask_documents else None
    return Rows(ids_BS, ids_BS.roll(-1, 1), first, documents_BS)


def try_checkpoint(session: Session) -> None:
    """The same way as a real one, but of the random states alone: written, read back and removed."""
    folder, held = session.folder / "dry_step", random_state()
    try:
        path = save_checkpoint(folder, 0, held, {"dry_step": True}, limit_seconds=session.config.checkpoint.timeout_seconds)
        load_checkpoint(path, held)
    finally:
        if session.parallel.mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def try_disk(session: Session) -> None:
    """Room for one more checkpoint. ValueError if there is none."""
    lacking = session.saver.lacking(session.engine.held())
    if lacking:
        raise ValueError(f"a checkpoint takes more than there is: {lacking}")
