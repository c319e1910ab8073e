"""The numbers of a step, made up for tests of what is written about it."""

from typing import Any

import torch
from tokenyard.train.step import LAYER_FIELDS, StepNumbers
from tokenyard.train.step_flags import GlobalFlags


def step_numbers(counts_LE: torch.Tensor, **changes: Any) -> StepNumbers:
    """Numbers of a step with these counts; losses, norm and drops are 0 unless `changes` has them."""
    layers = len(counts_LE)
    losses = {name: torch.zeros(layers).double() for name in LAYER_FIELDS if name != "dropped_L"}
    scalars = {name: torch.tensor(0.0).double() for name in ("cross_entropy", "gradient_norm")}
    values: dict[str, Any] = {
        "tokens": 0,
        "counts_LE": counts_LE,
        "dropped_L": torch.zeros(layers).long(),
        "mtp_D": torch.zeros(0),
        "global_flags": GlobalFlags(0, 0, 0, 0, 0, 0, None, [], 0.0, 0.0),
    }
    return StepNumbers(**(values | losses | scalars | changes))
