"""Fixtures for comparing with transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


class Widest:
    """torch, whose fp32 is fp64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


@pytest.fixture
def widen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`widen(*modules)`: where their code widens to fp32, it widens to fp64 instead; nothing else of it is changed."""

    def patch(*modules: Any) -> None:
        monkeypatch.setattr(Tensor, "float", Tensor.double)
        for module in modules:
            monkeypatch.setattr(module, "torch", Widest())

    return patch
