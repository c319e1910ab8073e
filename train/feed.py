"""What the data needs of the ranks, and what a run does when the data stops."""

import logging
import sys
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist

from ..data.batches import Batch
from ..data.prepare import Prepared
from ..data.stream.rows import World
from ..data.stream.stop import DataStop
from ..moe.documents import documents_of
from ..parallel.processes import is_first
from .config import Config
from .step import Rows

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


def as_rows(batch: Batch, first: int, config: Config, data: Prepared, device: torch.device) -> Rows:
    """A micro-batch on the device, with its documents told apart if attention is to stay inside of them."""
    ids_BS, targets_BS = batch.ids_BS.to(device), batch.targets_BS.to(device)
    if not config.data.mask_documents:
        return Rows(ids_BS, targets_BS, first)
    documents_BS, targets_BS = documents_of(ids_BS, targets_BS, data.tokenizer.end_of_document)
    return Rows(ids_BS, targets_BS, first, documents_BS)


def say_stop(stop: DataStop, step: int) -> int:
    """Tell why the run ends after `step`. Returns the exit code."""
    if is_first():
        print(f"tokenyard: stopped after step {step}: {stop}", file=sys.stderr)
    return stop.exit_code


class Waiting:
    """Seconds that training waited for data since they were last asked for."""

    def __init__(self) -> None:
        self._seconds, self._begin = 0.0, 0.0

    def __enter__(self) -> None:
        self._begin = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += perf_counter() - self._begin

    def take(self) -> float:
        """And begin anew."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
