"""A double of CUDA's graphs for tests without a GPU: `recording()` lets steps on a CPU take the code of a GPU and its graphs.

The double records operators with the tensors that they read and wrote, and replays them on the same memory, as a GPU does. What a
step decides on the host stays as it was at the capture, and what it reads at another address is not seen.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tokenyard.moe import device
from tokenyard.moe.kernels import operators
from tokenyard.train import cuda_graph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class Recorded(TorchDispatchMode):
    """A graph. Its work is done while it is captured, so the first replay does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, *tree_map(_at_its_address, (args, kwargs or {}, out))))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, out in self.calls:
            for static, x in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(x, torch.ScriptObject):
                    x.wait()  # a collective, whose result is in its arguments
                elif isinstance(x, Tensor) and static.data_ptr() != x.data_ptr():
                    static.copy_(x)


def _at_its_address(x: Any) -> Any:
    """A tensor of its own, which stays where x is."""
    return x.detach() if isinstance(x, Tensor) else x


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Yields the list of all graphs that are captured inside. There are no kernels, but for the one that puts rows."""
    made: list[Recorded] = []
    capturing: list[Recorded] = []

    @contextmanager
    def capture() -> Iterator[Recorded]:
        with Recorded() as graph:
            made.append(graph)
            capturing.append(graph)
            try:
                yield graph
            finally:
                capturing.clear()

    def read(x: Tensor, _place: str, _assumed: Any) -> Any:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x.tolist()

    with (
        patch.object(cuda_graph, "capture", capture),
        patch.multiple(device, KERNELS=False, _dry_run=device.DryRun("cuda"), _read=read),
        patch.object(operators, "put_rows", put_rows),
    ):
        yield made


@torch.library.custom_op("tokenyard_tests::put_rows", mutates_args=("own",))
def put_rows(x: Tensor, index_R: Tensor | None, rank_R: Tensor, row_R: Tensor, address_N: Tensor, own: Tensor) -> None:
    """See moe/kernels/operators.py."""
    rows, size = x if index_R is None else x[index_R], x[0].numel() * x.element_size()
    for source, rank, row in zip(rows.contiguous(), rank_R.tolist(), row_R.tolist(), strict=True):
        if rank >= 0:
            ctypes.memmove(int(address_N[rank]) + row * size, source.data_ptr(), size)
