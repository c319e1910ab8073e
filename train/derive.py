"""What the configuration leaves open until the device is known: precision, and how often a run logs.

Derived once, when a rank starts, and by the same facts on all ranks. What comes after, the run folder and checkpoints too, has the
values alone.
"""

import logging

import torch

from ..moe.device import kind_of
from .config.config import Config, Precision

log = logging.getLogger("tokenyard")

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}
PRECISION = {"cuda": Precision.bf16, "cpu": Precision.fp32}
LOG_EVERY = {"cuda": 10, "cpu": 1}
NAMES = {"cuda": "a GPU", "cpu": "a CPU"}


def derive(config: Config, device: torch.device, saved: str | None = None) -> str:
    """Fill in `config`. Returns where the precision is from, in words.

    `saved`: the precision of the checkpoint that the run goes on from. `auto` keeps it, on whatever machine.
    """
    kind = kind_of(device)
    if config.log.every is None:
        config.log.every = LOG_EVERY[kind]
    if config.precision is not Precision.auto:
        return "as set"
    if saved is None or saved == Precision.auto.value:
        config.precision = PRECISION[kind]
        return f"the default on {NAMES[kind]}"
    config.precision = Precision[saved]
    return "that of the checkpoint"


def set_products(config: Config, device: torch.device, precision_from: str) -> None:
    """What this process makes fp32 products on CUDA in. In bf16 the router's are the only ones, and these are never in TF32."""
    if kind_of(device) != "cuda":
        return
    fp32 = config.precision is Precision.fp32
    torch.set_float32_matmul_precision("high" if config.tf32 and fp32 else "highest")
    if fp32:
        log.warning("precision=fp32 (%s): on a GPU a step takes several times as long as with precision=bf16", precision_from)
