"""Validation: the loss per token over rows that do not depend on the layout, and the load of the experts."""

from typing import NamedTuple

import torch

from ..data.batches import IGNORE
from ..parallel.collectives import sum_over
from ..parallel.config import Overflow
from ..parallel.process_group import is_first
from .batch import as_rows
from .config.complain import say
from .exit import too_little_room
from .loss import Totals
from .session import Session
from .step import forward


class Evaluation(NamedTuple):
    """The results of a validation pass over all ranks."""

    loss: float
    """Mean cross entropy per token, nats."""
    tokens: int
    counts_LE: list[list[int]]
    """Choices of each expert by valid tokens, without null experts."""


@torch.no_grad()
def evaluate_session(session: Session) -> Evaluation:
    """Evaluates the first evaluate.sequences rows of the validation split. Does not change the training state. Collective.

    Says so if rows had no room in the exchange, whose outputs the loss then lacks; it ends no run.
    """
    parallel, micro = session.parallel, session.micro
    data = parallel.mesh.data
    mine = range(data.rank * micro, (data.rank + 1) * micro)
    parallel.model.eval()
    total = None
    for batch in session.data.validation.batches(session.config.evaluate.sequences, micro * data.size, mine):
        rows = as_rows(batch, 0, session.config, session.data, session.device)
        shares = forward(parallel, rows, Totals(tokens=1, sequences=1, micro_batches=1))
        counts_tokens = parallel.pipeline is None or parallel.pipeline.last in parallel.pipeline.layers
        tokens = (rows.targets != IGNORE).sum() * counts_tokens / parallel.mesh.sequence.size
        part = torch.cat([shares.cross_entropy.view(1).double(), tokens.view(1).double(), shares.counts_LE.flatten().double()])
        if parallel.overflow is not None:
            part = torch.cat([part, shares.overflow_L.sum().double().view(1)])
        total = part if total is None else total + part
    parallel.model.train()
    assert total is not None
    loss, tokens, *counts = sum_over(total, parallel.mesh.everyone).tolist()
    overflow = 0 if parallel.overflow is None else int(counts.pop())
    if overflow and parallel.overflow is not Overflow.repair and is_first():
        say(f"validation: {too_little_room(session.config.parallel, overflow)}")
    moe = parallel.model.config.moe
    columns = moe.experts + moe.router.null_experts
    rows_of_counts = [[int(n) for n in counts[i : i + moe.experts]] for i in range(0, len(counts), columns)] if counts else []
    return Evaluation(loss / max(1, tokens), round(tokens), rows_of_counts)
