"""A rank that raises in a step of the training, where the others wait for it in a collective that nothing else would end."""

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_run import configured, events_of
from tokenyard.moe.layer import MoELayer
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

RAISED = "raised"


def raises_in_step_3(folder: Path) -> int:
    """On ranks of the pool: rank 1 does, in layer 1. Its process and its connections stay, as NCCL's seem to."""
    session = open_session(configured(folder, "parallel.expert=2"), torch.device("cpu"))

    def fail(*_: Any) -> None:
        if session.step == 2:
            (folder / RAISED).touch()
            raise RuntimeError("a kernel of rank 1\nfailed")

    if session.parallel.mesh.rank == 1:
        next(m for m in session.parallel.model.blocks[1].modules() if isinstance(m, MoELayer)).register_forward_pre_hook(fail)
    with closing(session), build_run_logger(session) as run_logger:
        try:
            return train_session(session, run_logger)
        except RuntimeError:
            time.sleep(90)  # a rank that hangs while it leaves
            raise


@pytest.mark.fault(23, "raised in a step, by a rank that then hangs: the others end within seconds, and name it")
def test_it_is_named_and_ends_the_others_within_seconds(ranks: Any, tmp_path: Path) -> None:
    """By default a collective may take ten minutes."""
    with pytest.raises(Exception, match="rank 0 died with exit code 1") as error:
        ranks(2, raises_in_step_3, tmp_path / "run", limit_seconds=60)
    seconds = time.time() - (tmp_path / "run" / RAISED).stat().st_mtime
    line = "tokenyard: rank 1, step 3, forward, layer 1: RuntimeError: a kernel of rank 1 failed"
    assert str(error.value).count(line) == 1
    (event,) = events_of(tmp_path / "run", "failed")
    assert (event["step"], event["error"]) == (2, "RuntimeError: a kernel of rank 1 failed")
    print(f"{seconds:.1f} s")
    assert seconds < 30
