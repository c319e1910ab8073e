"""debug.collectives: before each collective its ranks compare what they are about to do, and name the rank that differs.

Without it a rank that skips a collective, or disagrees on row counts, shows up later as a hang or as wrong numbers elsewhere.
"""

import zlib
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist

from .collectives import all_gather, swap_by_messages
from .mesh import Axis
from .progress import PROGRESS


class CollectiveMismatch(RuntimeError):
    """The ranks of a group are about to enter different collectives. All of them raise it, with the same message."""


def compare(name: str, axis: Axis, send: list[int] | None, receive: list[int] | None) -> None:
    """Raises CollectiveMismatch unless (collective, step, phase, layer) agree on all ranks, and rows sent with rows expected."""
    if axis.group is None:
        return
    own = _code(name), PROGRESS.step, _code(PROGRESS.phase), -1 if PROGRESS.layer is None else PROGRESS.layer
    splits = [*(send or [0] * axis.size), *(receive or [0] * axis.size)]
    rows = _gather([*own, *splits], axis)
    collectives = [tuple(row[: len(own)]) for row in rows]
    usual, _ = Counter(collectives).most_common(1)[0]
    wrong = [rank for rank, other in enumerate(collectives) if other != usual]
    where = f"step {PROGRESS.step}, {PROGRESS.phase}" + ("" if PROGRESS.layer is None else f", layer {PROGRESS.layer}")
    if wrong:
        others = f"the others; {'they are' if own == usual else 'this rank is'} at {name}, {where}"
        raise CollectiveMismatch(f"{_ranks(wrong, axis)} is about to do another collective than {others}")
    for sender, row in enumerate(rows):
        for receiver, there in enumerate(rows):
            sent, expected = row[len(own) + receiver], there[len(own) + axis.size + sender]
            if sent != expected:
                between = f"{_ranks([sender], axis)} sends {sent} rows to {_ranks([receiver], axis)}, which expects {expected}"
                raise CollectiveMismatch(f"{name} at {where}: {between}")


def _ranks(indices: list[int], axis: Axis) -> str:
    """Returns the global ranks of these ranks of the axis, as text."""
    ranks: Any = axis.ranks or dist.get_process_group_ranks(axis.group or dist.group.WORLD)
    return "rank " + ", ".join(str(ranks[index]) for index in indices)


def _gather(numbers: list[int], axis: Axis) -> list[list[int]]:
    """Returns the numbers of each rank of the axis."""
    device = torch.device("cuda") if dist.get_backend(axis.group) == "nccl" else torch.device("cpu")
    mine = torch.tensor(numbers, dtype=torch.int64, device=device)
    if axis.ranks:
        return swap_by_messages([mine] * axis.size, axis).tolist()
    out = mine.new_empty(axis.size * len(mine))
    all_gather(out, mine, group=axis.group)
    return out.view(axis.size, -1).tolist()


def _code(text: str) -> int:
    return zlib.crc32(text.encode())
