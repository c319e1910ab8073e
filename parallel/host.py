"""From the host to the device without waiting for it: a GPU copies pinned memory when it comes to it, and the host goes on."""

import torch
from torch import Tensor

from ..moe.device import kind_of


def on_device(x: Tensor, device: torch.device) -> Tensor:
    """The host's tensor `x` on `device`."""
    return x.pin_memory().to(device, non_blocking=True) if kind_of(device) == "cuda" else x.to(device)
