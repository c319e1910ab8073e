"""Before the first step: the largest batch forward and backward, a small checkpoint, the disk space, the trackers.

If the run lacks anything, it ends in its first minute and not in its third hour. Afterwards weights, moments, random state and the
position in the data are bit for bit what they were.
"""

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from ...checkpoint.store import load_checkpoint, save_checkpoint
from ...moe.token_info import BatchPosition
from ...parallel.object_collectives import any_rank, from_all
from ...parallel.progress import PROGRESS, in_phase
from ...parallel.shard import LocalShard
from ..batch import Rows
from ..config.complain import say
from ..config.environment import ranks_restarted
from ..exit import ExitCode, Failure, RunStop, find_note, in_one_line, leave_note, place
from ..logging.journal import Journal
from ..logging.run_logger import RunLogger
from ..session import Session
from ..state import random_state, restore_random
from ..step import StepInput


@in_phase("dry step")
def dry_step(session: Session, run_logger: RunLogger) -> None:
    """Raises RunStop, one line, for anything that is lacking. By default one rank alone only checks the disk space. Collective."""
    several, setting = session.parallel.mesh.world > 1, session.config.debug.dry_step
    if setting is None and not several:
        check(session, "the disk", try_disk)
    # A host that joins the others has started its ranks for the first time.
    if not (several and not any_rank(ranks_restarted())[0] if setting is None else setting):
        return
    PROGRESS.step = session.step
    before = {name: LocalShard(shard, state.clone()) for name, (shard, state) in random_state().items()}
    for what, test in (("a step", try_step), ("a checkpoint", try_checkpoint), ("the disk", try_disk)):
        check(session, what, test)
    run_logger.wait_for_trackers()
    restore_random(before)
    run_logger.log_event("dry_step", step=session.step)


def check(session: Session, what: str, test: Callable[[Session], None]) -> None:
    """Runs a test. Raises RunStop on all ranks if it fails on one.

    A rank that fails in the step, or for lack of memory, ends all processes, because the others wait for it in a collective.
    """
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
    """Ends this process, and the others by a note. If there is a note already, this failure follows from it and is not reported."""
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
    """Runs a step without the update, on micro-batches in which all tokens count, and allocates the moments of AdamW."""
    session.engine.state_to_save()  # allocates the moments
    config, data = session.config, session.parallel.mesh.data
    first = data.rank * session.micro
    micro_batches = min(config.batch.sequences // data.size // session.micro, 2 * config.parallel.pipeline)  # a full pipeline
    batches = [random_rows(session, first) for _ in range(micro_batches)]
    position = BatchPosition(config.seed, session.step + 1)
    session.engine.step(
        StepInput(batches, 0.0, config.optimizer.clip_norm, position, accepts=lambda _: False, qk_clip=config.optimizer.qk_clip)
    )
    session.engine.optimizer.zero_grad(set_to_none=True)


def random_rows(session: Session, first: int) -> Rows:
    """Returns a micro-batch of random tokens, drawn from a generator of its own, without leaving out any token."""
    generator, shape = torch.Generator().manual_seed(first), (session.micro, session.config.sequence_length)
    ids_BS = torch.randint(session.data.tokenizer.size, shape, generator=generator).to(session.device)
    documents_BS = torch.zeros_like(ids_BS) if session.config.data.mask_documents else None
    return Rows(ids_BS, ids_BS.roll(-1, 1), first, documents_BS)


def try_checkpoint(session: Session) -> None:
    """Writes, reads and removes a checkpoint in the way of a real one, but of the random states alone."""
    folder, held = session.folder / "dry_step", random_state()
    try:
        path = save_checkpoint(folder, 0, held, {"dry_step": True}, limit_seconds=session.config.checkpoint.timeout_seconds)
        load_checkpoint(path, held)
    finally:
        if session.parallel.mesh.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def try_disk(session: Session) -> None:
    """Raises ValueError if there is no space for one more checkpoint."""
    lacking = session.saver.space_error(session.engine.state_to_save())
    if lacking:
        raise ValueError(f"a checkpoint takes more than there is: {lacking}")
