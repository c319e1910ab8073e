"""Turns the batches of the data into this rank's rows on the device, on a GPU one step ahead."""

from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE, Batch
from ..data.build import DataPipeline
from ..data.errors import DataStop
from ..moe.device import kind_of
from ..moe.model import shift_left
from ..moe.token_info import documents_of
from ..parallel.mesh import Place
from ..parallel.progress import in_phase
from ..parallel.streams import Event, SideStream, on_device, record_event, stream_waits
from .config.config import Config


class Rows(NamedTuple):
    """This rank's part of a global batch: token ids and targets, both (rows, S); a target of IGNORE is not counted."""

    ids: Tensor
    targets: Tensor
    first: int = 0
    """The row of the global batch that is the first here; the others follow."""
    documents: Tensor | None = None
    """The index of each token's document in its row, if attention stays inside documents."""
    valid: list[int] | None = None
    """The result of `valid_targets`, if the host has counted them before they went to the device."""
    scores: Tensor | None = None
    """(2, tokens whose logits this rank computes): receives what `head_loss` stores of each."""


class NextRows(NamedTuple):
    """The rows of a step that has not begun, or the error of preparing them."""

    step: int
    rows: list[Rows]
    arrived: Event
    error: Exception | None


class BatchLoader:
    """Loads this rank's rows, one step after the other. Micro-step m of all ranks together is the m-th run of the global batch.

    On a GPU the host prepares the next step's rows while the device works on the current one, and a side stream copies them. On a
    CPU both would share the same cores.
    """

    def __init__(self, config: Config, data: DataPipeline, axis: Place, micro: int, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.micro, self._first, self._together = micro, axis.rank * micro, micro * axis.size
        self.ahead = kind_of(device) == "cuda"
        self._side, self._begin = SideStream(device), record_event(device)
        self._next: NextRows | None = None
        self._waited = 0.0

    def waited(self) -> float:
        """Returns the seconds that training waited for rows since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def take(self, step: int) -> list[Rows]:
        """Returns the rows of `step`, counted from 0. Collective.

        Raises a DataStop, on all ranks, if there are none; OSError or ValueError, on this rank alone, if it cannot read them.
        """
        found, self._next = self._next, None
        if found is None or found.step != step:
            begin = perf_counter()
            try:
                return self._made(step)
            finally:
                self._waited += perf_counter() - begin
        if found.error is not None:
            raise found.error
        stream_waits(found.arrived, *(x for rows in found.rows for x in rows if isinstance(x, Tensor)))
        return found.rows

    @in_phase("data")
    def prepare(self, step: int) -> None:
        """Prepares the rows that `take(step)` will return; it raises the error, if there is one. Collective."""
        if not self.ahead or step == self.config.steps:
            return
        rows, error, begin, work = [], None, perf_counter(), record_event(self.device)
        with self._side.behind(self._begin):
            try:
                rows = self._made(step)
            except (DataStop, OSError, ValueError) as found:
                error = found
            self._next = NextRows(step, rows, record_event(self.device), error)
        if work.done():  # the device has been idle
            self._waited += perf_counter() - begin

    def empty(self, step: int) -> list[Rows]:
        """Returns micro-batches without a token that counts: `step`'s collectives need every rank, also one that has no rows."""
        ids_BS = torch.zeros(self.micro, self.config.sequence_length, dtype=torch.int64, device=self.device)
        documents_BS = ids_BS if self.config.data.mask_documents else None
        return [Rows(ids_BS, torch.full_like(ids_BS, IGNORE), start, documents_BS) for start in self._starts(step)]

    def _starts(self, step: int) -> range:
        """Returns the first row of each micro-batch of this rank."""
        return range(self._first, self.data.train.sizes.of(step), self._together)

    def _made(self, step: int) -> list[Rows]:
        batches = [(self.data.train.batch(step, range(start, start + self.micro)), start) for start in self._starts(step)]
        return [as_rows(batch, start, self.config, self.data, self.device) for batch, start in batches]


def as_rows(batch: Batch, first: int, config: Config, data: DataPipeline, device: torch.device) -> Rows:
    """Returns a micro-batch on the device, with its counts, and with its documents if attention stays inside them.

    Raises ValueError for a token id that the model does not know, which would destroy the context of a GPU.
    """
    if batch.ids_BS.max() >= config.model.vocabulary or batch.targets_BS.max() >= config.model.vocabulary:
        raise ValueError(f"row {first} and following: a token id is not below model.vocabulary={config.model.vocabulary}")
    rows = Rows(batch.ids_BS, batch.targets_BS, first)
    if config.data.mask_documents:
        documents_BS, targets_BS = documents_of(rows.ids, rows.targets, data.tokenizer.end_of_document, IGNORE)
        rows = rows._replace(targets=targets_BS, documents=documents_BS)
    rows = rows._replace(valid=valid_targets(rows, config.model.mtp_depth))
    documents_BS = None if rows.documents is None else on_device(rows.documents, device)
    return rows._replace(ids=on_device(rows.ids, device), targets=on_device(rows.targets, device), documents=documents_BS)


def targets_ahead(rows: Rows, depth: int) -> Tensor:
    """Returns the target `depth` positions further, (B, S); IGNORE beyond the end of the sequence, or of the document."""
    return shift_left(rows.targets, depth, IGNORE, rows.documents)


def valid_targets(rows: Rows, mtp_depth: int) -> list[int]:
    """Counts the valid targets of the model itself (depth 0), then those of each module of multi-token prediction."""
    counts = [(targets_ahead(rows, depth) != IGNORE).sum() for depth in range(mtp_depth + 1)]
    return torch.stack(counts).tolist()
