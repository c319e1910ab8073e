"""Fixtures for comparing with transformers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


class Widest:
    """The torch module with fp64 in place of fp32."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.fixture
def widen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`widen(*modules)` makes their code widen to fp64 where it widens to fp32, and changes nothing else."""

    def patch(*modules: Any) -> None:
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        for module in modules:
            monkeypatch.setattr(module, "torch", Widest())

    return patch


@pytest.fixture
def bounded_kernels() -> Iterator[None]:
    """See kernel_bounds.py, which imports triton."""
    from kernel_bounds import bounded

    with bounded():
        yield
