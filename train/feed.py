"""What the data needs of the ranks, and how a batch becomes rows on the device, on a GPU a step ahead."""

import logging
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batches import IGNORE, Batch
from ..data.build import Prepared
from ..data.errors import DataStop
from ..data.stream.packing import World
from ..moe.device import kind_of
from ..moe.token_info import documents_of
from ..parallel.mesh import Axis
from ..parallel.object_collectives import from_all
from ..parallel.process_group import is_first, wait_for_all
from ..parallel.progress import doing
from ..parallel.streams import Event, SideStream, on_device, record, stream_waits
from .config.config import Config
from .step import Rows, valid_targets

if TYPE_CHECKING:
    from .reporter import Reporter

SAID_ROWS = 10
"""Bad rows of a source that are said on the console; events.jsonl has all."""
log = logging.getLogger("tokenyard")


def data_world(device: torch.device) -> World:
    """All ranks: each of them tokenizes its share of the documents."""
    if not dist.is_initialized():
        return World()
    return World(dist.get_rank(), dist.get_world_size(), lambda data: gather_bytes(data, device))


def gather_bytes(data: bytes, device: torch.device) -> list[bytes]:
    """What each rank has, on every rank: an all-gather of the sizes, then one of the bytes. Collective."""
    size = torch.tensor([len(data)], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    longest = max(int(each) for each in sizes)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(data)] = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine)
    return [part.cpu().numpy()[: int(each)].tobytes() for part, each in zip(parts, sizes, strict=True)]


class Ahead(NamedTuple):
    """The rows of a step before that begins, or what their making has raised."""

    step: int
    rows: list[Rows]
    arrived: Event
    error: Exception | None


class Feed:
    """This rank's rows of one step after the other. Micro-step m of all ranks together is the m-th run of the global batch.

    On a GPU the host makes the next step's while the device works on this one's, and a side stream copies them. On a CPU both would
    have the same cores.
    """

    def __init__(self, config: Config, data: Prepared, axis: Axis, micro: int, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        self.micro, together = micro, micro * axis.size
        self.starts = range(axis.rank * micro, config.batch.sequences, together)
        self.ahead = kind_of(device) == "cuda"
        self._side, self._begin = SideStream(device), record(device)
        self._next: Ahead | None = None
        self._waited = 0.0

    def waited(self) -> float:
        """Seconds that training waited for rows since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def take(self, step: int) -> list[Rows]:
        """The rows of `step`, counted from 0. Collective.

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

    @doing("data")
    def prepare(self, step: int) -> None:
        """Make the rows that `take(step)` will give. What that raises is kept for it. Collective."""
        if not self.ahead or step == self.config.steps:
            return
        rows, error, begin, work = [], None, perf_counter(), record(self.device)
        with self._side.behind(self._begin):
            try:
                rows = self._made(step)
            except (DataStop, OSError, ValueError) as found:
                error = found
            self._next = Ahead(step, rows, record(self.device), error)
        if work.done():  # the device had nothing left to do
            self._waited += perf_counter() - begin

    def nothing(self) -> list[Rows]:
        """As many rows without a token that counts."""
        return [no_rows(self.micro, self.config.sequence_length, start, self.device) for start in self.starts]

    def _made(self, step: int) -> list[Rows]:
        batches = [(self.data.train.batch(step, range(start, start + self.micro)), start) for start in self.starts]
        return [as_rows(batch, start, self.config, self.data, self.device) for batch, start in batches]


def open_together(ready: Callable[[], Prepared]) -> Prepared:
    """The data, opened on rank 0, which may have to tokenize it, and then on the others, which find it in the cache. Collective.

    What is refused on one of them is refused on all (ValueError), and so is a source that does not answer (DataUnavailable).
    """
    data: Prepared | None = None
    failure: Exception | None = None
    for mine in (is_first(), not is_first()):
        if mine:
            try:
                data = ready()
            except (DataStop, ValueError) as error:
                failure = error
        wait_for_all()
        if failures := [each for each in from_all(failure) if each is not None]:
            raise failures[0]
    assert data is not None
    return data


def tell_findings(data: Prepared, step: int, reporter: "Reporter") -> None:
    """Rows and files that could not be read while the rows of `step` were: all of them as events, the first rows also in words."""
    for found in data.train.findings():
        reporter.event(found.kind, step=step, source=found.source, file=found.file, row=found.row, reason=found.reason)
        if found.kind == "file_failed":
            reporter.alert("file_failed", f"step {step}: {found}")
        elif found.number <= SAID_ROWS:
            log.warning("bad row, skipped: %s", found)


def as_rows(batch: Batch, first: int, config: Config, data: Prepared, device: torch.device) -> Rows:
    """A micro-batch on the device, counted, with its documents told apart if attention is to stay inside of them.

    ValueError for a token id that the model does not know, which a GPU would answer by ending its context.
    """
    if batch.ids_BS.max() >= config.model.vocabulary or batch.targets_BS.max() >= config.model.vocabulary:
        raise ValueError(f"row {first} and following: a token id is not below model.vocabulary={config.model.vocabulary}")
    rows = Rows(batch.ids_BS, batch.targets_BS, first)
    if config.data.mask_documents:
        documents_BS, targets_BS = documents_of(rows.ids, rows.targets, data.tokenizer.end_of_document)
        rows = rows._replace(targets=targets_BS, documents=documents_BS)
    rows = rows._replace(valid=valid_targets(rows, config.model.mtp_depth))
    documents_BS = None if rows.documents is None else on_device(rows.documents, device)
    return rows._replace(ids=on_device(rows.ids, device), targets=on_device(rows.targets, device), documents=documents_BS)


def no_rows(sequences: int, length: int, first: int, device: torch.device) -> Rows:
    """A micro-batch without a token that counts: the collectives of a step need every rank, also one that has nothing to read."""
    ids_BS = torch.zeros(sequences, length, dtype=torch.int64, device=device)
    return Rows(ids_BS, torch.full_like(ids_BS, IGNORE), first)
