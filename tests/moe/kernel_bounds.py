"""Kernels that touch memory outside of their tensors fail, in Triton's interpreter; a GPU would not say so."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

REACHED: list[torch.Tensor] = []
"""Tensors that a kernel reaches by their addresses, which another tensor has."""


@contextmanager
def bounded() -> Iterator[None]:
    """Within, a load or store outside of the tensor arguments of the kernel, and of REACHED, raises triton's InterpreterError."""
    tensors: list[tuple[int, int]] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def called(self: Any, args: Any, kwargs: Any) -> Any:
        placed = arguments(self, args, kwargs)
        known = *placed[0], *placed[1].values(), *REACHED
        tensors[:] = [memory(x) for x in known if isinstance(x, torch.Tensor) and x.numel()]
        return placed

    def check(pointers: Any, mask: Any) -> None:
        address, size = pointers.data.astype(np.int64)[mask.data.astype(bool)], interpreter._get_np_dtype(pointers.get_element_ty())
        inside = np.zeros(address.shape, bool)
        for begin, end in tensors:
            inside |= (address >= begin) & (address + np.dtype(size).itemsize <= end)
        assert inside.all(), f"{(~inside).sum()} addresses are outside of the kernel's tensors"

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with (
        patch.object(executor, "_init_args_hst", called),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
    ):
        yield


def memory(x: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first element of a tensor to its last one's end."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
