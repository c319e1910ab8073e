"""Settings that are open until the device is known: the precision, and how often a run logs.

They are derived once, when a rank starts, from facts that are the same on all ranks. Everything after that, run folder and
checkpoints included, has the derived values.
"""

import logging

import torch

from ..moe.device import kind_of
from .config.config import Config, ConfigError, Device, Precision
from .config.rules.rules import NO_SNAPSHOT

log = logging.getLogger("tokenyard")

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}
PRECISION = {"cuda": Precision.bf16, "cpu": Precision.fp32}
LOG_EVERY = {"cuda": 10, "cpu": 1}
NAMES = {"cuda": "a GPU", "cpu": "a CPU"}


def derive(config: Config, device: torch.device, saved: str | None = None) -> str:
    """Fills in `config`. Returns where the precision is from, in words. Raises ConfigError for what the device does not have.

    `saved`: the precision of the checkpoint that the run resumes from, which `auto` keeps on any machine.
    """
    kind = kind_of(device)
    if kind == "cpu" and config.device is Device.auto and config.profile.memory and config.profile.steps is None:
        raise ConfigError.of("profile.memory", "true", NO_SNAPSHOT, "profile.memory=false")
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
    """Sets whether fp32 products on CUDA use TF32. In bf16 only the router has any, and these never do."""
    if kind_of(device) != "cuda":
        return
    fp32 = config.precision is Precision.fp32
    torch.set_float32_matmul_precision("high" if config.tf32 and fp32 else "highest")
    if fp32:
        log.warning("precision=fp32 (%s): on a GPU a step takes several times as long as with precision=bf16", precision_from)
