"""How long training waits for a save: of a model with some hundred MB of state, at most a tenth of a synchronous one."""

import statistics
from contextlib import closing
from pathlib import Path

import pytest
import torch
from checkpoint_run import configured
from tokenyard.checkpoint.saver import Outcome
from tokenyard.train.checkpointing import write_checkpoint
from tokenyard.train.run import single_step
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

LARGE = """model.layers=4 model.width=512 model.heads=8 model.hidden=512 model.moe.hidden=512 sequence_length=32 batch.sequences=4
    steps=1000 checkpoint.keep=1"""
TIMES = 5


@pytest.mark.fault(5)
def test_the_blocking_part(tmp_path: Path, record_property) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with closing(open_session(configured(tmp_path / "run", *LARGE.split()), torch.device("cpu"))) as session:
            synchronous = [save(session, asynchronous=False) for _ in range(TIMES + 1)][1:]
            beside = [save(session, asynchronous=True) for _ in range(TIMES + 1)][1:]
    finally:
        torch.set_num_threads(threads)
    whole = statistics.median(outcome.seconds for outcome in synchronous)
    blocked = statistics.median(outcome.blocked_seconds for outcome in beside)
    size, share = beside[0].bytes / 1e6, blocked / whole
    text = f"{size:.0f} MB: {whole:.3f} s synchronous, {blocked:.4f} s blocked ({share:.1%}), medians of {TIMES}"
    print(text)
    record_property("measured", text)
    assert blocked <= 0.1 * whole


def save(session: Session, asynchronous: bool) -> Outcome:
    """With steps before, and beside it until it is durable."""
    single_step(session)
    outcome = write_checkpoint(session, asynchronous)
    while outcome is None:
        single_step(session)
        outcome = session.saver.poll_all()
    assert outcome.error is None
    return outcome
