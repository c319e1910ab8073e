"""Validation: the loss over rows that do not depend on the layout, per token, per byte and by source; the load of the experts."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..parallel.collectives import sum_over
from ..parallel.config import Overflow
from ..parallel.process_group import is_first
from .batch import Rows, as_rows
from .config.complain import say
from .exit import too_little_room
from .loss import Totals
from .session import Session
from .step import forward


class TextLoss(NamedTuple):
    """The cross entropy of a text, summed over all ranks."""

    nats: float
    tokens: float
    bytes: float
    """UTF-8 bytes of the text of the tokens."""

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / max(1.0, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, which models with different tokenizers can be compared by."""
        return self.nats / math.log(2) / max(1.0, self.bytes)


class Evaluation(NamedTuple):
    """The results of a validation pass over all ranks."""

    loss: float
    """Mean cross entropy per token, nats."""
    tokens: int
    counts_LE: list[list[int]]
    """Choices of each expert by valid tokens, without null experts."""
    bits_per_byte: float = 0.0
    """See TextLoss."""
    sources: dict[str, TextLoss] = {}  # noqa: RUF012
    """The sources of mixed data that have tokens here; empty if there is one source. A row counts for the source it begins in."""
    scores: dict[str, float] = {}  # noqa: RUF012
    """Results of probes and tasks, under their keys in metrics.jsonl."""


@torch.no_grad()
def evaluate_session(session: Session) -> Evaluation:
    """Evaluates the first evaluate.sequences rows of the validation split. Does not change the training state. Collective.

    Says so if rows had no room in the exchange, whose outputs the loss then lacks; it ends no run.
    """
    parallel, micro, validation = session.parallel, session.micro, session.data.validation
    data, sequences = parallel.mesh.data, session.config.evaluate.sequences
    mine = range(data.rank * micro, (data.rank + 1) * micro)
    parallel.model.eval()
    total = None
    for index, batch in enumerate(validation.batches(sequences, micro * data.size, mine)):
        rows = as_rows(batch, 0, session.config, session.data, session.device)
        rows = rows._replace(
            scores=torch.zeros(2, rows.ids.numel() // parallel.mesh.sizes["context"], dtype=torch.float64, device=session.device)
        )
        shares = forward(parallel, rows, Totals(tokens=1, sequences=1, micro_batches=1))
        place = index * micro * data.size
        by_source = _by_source(session, rows, validation.sources(sequences, range(place + mine.start, place + mine.stop)))
        part = torch.cat([shares.cross_entropy.view(1).double(), by_source.flatten(), shares.counts_LE.flatten().double()])
        if parallel.overflow is not None:
            part = torch.cat([part, shares.overflow_L.sum().double().view(1)])
        total = part if total is None else total + part
    parallel.model.train()
    assert total is not None
    nats, *rest = sum_over(total, parallel.mesh.everyone).tolist()
    names = validation.source_names
    sources = {name: TextLoss(*rest[3 * place : 3 * place + 3]) for place, name in enumerate(names)}
    counts = rest[3 * len(names) :]
    overflow = 0 if parallel.overflow is None else int(counts.pop())
    if overflow and parallel.overflow is not Overflow.repair and is_first():
        say(f"validation: {too_little_room(session.config.parallel, overflow)}")
    moe = parallel.model.config.moe
    columns = moe.experts + moe.router.null_experts
    rows_of_counts = [[int(n) for n in counts[i : i + moe.experts]] for i in range(0, len(counts), columns)] if counts else []
    whole = TextLoss(nats, sum(each.tokens for each in sources.values()), sum(each.bytes for each in sources.values()))
    sources = {name: each for name, each in sources.items() if each.tokens} if len(names) > 1 else {}
    return Evaluation(whole.per_token, round(whole.tokens), rows_of_counts, whole.bits_per_byte, sources)


def _by_source(session: Session, rows: Rows, sources: list[int]) -> Tensor:
    """Returns this rank's share of the nats, tokens and bytes of each source, fp64 (sources, 3). `sources`: of each row."""
    mesh, pipeline, count = session.parallel.mesh, session.parallel.pipeline, len(sources)
    assert rows.scores is not None
    nats_B = rows.scores[0].double().view(count, -1).sum(1) / mesh.tensor.size  # of the stage with the head alone
    valid_BS = rows.targets != IGNORE
    bytes_BS = session.token_bytes[rows.targets.clamp(min=0)] * valid_BS
    counts_here = pipeline is None or pipeline.last in pipeline.layers
    counts_B2 = torch.stack([valid_BS.sum(1), bytes_BS.sum(1)], dim=1) * counts_here / mesh.sequence.size
    found = torch.zeros(len(session.data.validation.source_names), 3, dtype=torch.float64, device=nats_B.device)
    return found.index_add_(0, torch.tensor(sources, device=nats_B.device), torch.cat([nats_B[:, None], counts_B2.double()], dim=1))
