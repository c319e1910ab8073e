"""The process of one side: it builds the model, then takes as many steps as each request asks for, and answers with JSON."""

import gc
import json
import os
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ...data.batches import IGNORE
from . import others, ours
from .cases import Case

BUILDERS = {
    "ours": ours.build,
    "transformers": others.build_transformers,
    "torchtitan": others.build_torchtitan,
    "megatron": others.build_megatron,
    "deepspeed": others.build_deepspeed,
}
"""By `builder` of a side: from a case and a variant to the model."""


def main() -> None:
    """Serves one side: the argument is the task; each line of standard input is a number of steps.

    It is answered by seconds, losses and peak memory.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    case = Case(**task["case"])
    try:
        import_module(task["imports"])
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers)
        return
    Trainer(tiny(case), task["builder"], task["variant"]).steps(1)  # libraries import and reserve much in their first step
    trainer = Trainer(case, task["builder"], task["variant"])
    print(json.dumps({}), file=answers)
    for line in sys.stdin:
        seconds, losses = trainer.steps(json.loads(line))
        print(json.dumps({"seconds": seconds, "losses": losses, "peak": trainer.peak()}), file=answers)


class Trainer:
    """A model and its AdamW, the same for all sides."""

    def __init__(self, case: Case, builder: str, variant: str) -> None:
        self.case = case
        gc.collect()
        self.before = memory("VmRSS")
        built = BUILDERS[builder](case, variant)
        self.model, self.loss = built.model.train(), built.loss
        self.optimizer = build_optimizer(built.model)
        self.generator = torch.Generator().manual_seed(1)
        forget_peak()

    def steps(self, count: int) -> tuple[float, list[float]]:
        """Seconds of all `count` steps, and their losses. Each step has new tokens, so the load of the experts changes."""
        batches = [self._batch() for _ in range(count)]
        start = perf_counter()
        losses = [self._step(*batch) for batch in batches]
        return perf_counter() - start, [loss.item() for loss in losses]

    def peak(self) -> int:
        """Returns the peak resident bytes in a step, without those before the model was built."""
        return memory("VmHWM") - self.before

    def _step(self, ids_BS: Tensor, targets_BS: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(ids_BS, targets_BS)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _batch(self) -> tuple[Tensor, Tensor]:
        shape = self.case.sequences, self.case.length
        ids_BS = torch.randint(self.case.vocabulary, shape, generator=self.generator)
        return ids_BS, torch.cat([ids_BS[:, 1:], torch.full((shape[0], 1), IGNORE)], dim=1)


def tiny(case: Case) -> Case:
    """Returns the case with small sizes."""
    return replace(case, width=8 * case.heads, hidden=16, layers=1, vocabulary=64, sequences=1, length=16)


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Returns AdamW as in train/optimizer.py. The small learning rate keeps routers, which no loss balances, from collapsing."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=True)


def memory(key: str) -> int:
    """Returns the resident bytes of this process: VmRSS now, VmHWM the peak. 0 on systems other than Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def forget_peak() -> None:
    """Resets VmHWM to the current resident memory."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
