"""Numbers that show early that a run will diverge: attention logits, and the norms of weights, gradients and updates by kind.

docs/stability.md says what they mean. A blocks with softmax attention, H query heads, K kinds of weight.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...moe.config import ModelConfig
from ...parallel.apply import local
from ...parallel.collectives import max_over, sum_over
from ..attention_logits import attention_layers, largest_logits, watch
from ..config.config import EngineKind
from ..lean_adamw import LeanAdamW
from ..muon import Muon
from ..session import Session

KINDS = {
    "experts": ".experts.",
    "router": ".router.",
    "shared": ".shared",
    "norms": "norm",
    "attention": ".attention.",
    "dense": ".dense.",
    "embedding": "embedding.",
    "head": "head.",
    "other": "",
}
"""The kinds of weight, and what the name of one contains. The first that fits is the kind."""
NORMS = ("weight_norm", "grad_norm", "update_norm")
PIECE = 2**24
"""Elements whose update is computed at a time."""


class StabilityStats:
    """Collects on every rank, in the same order: `begin_step` before a step, `tensors` after it."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def begin_step(self, watches: bool) -> None:
        """Makes attention keep its largest logits in the coming step, or not."""
        watch(self.session.parallel, watches)
        if isinstance(optimizer := self.session.engine.optimizer, Muon):
            optimizer.squared_updates = {} if watches else None

    def tensors(self, scale: Tensor | float) -> dict[str, Tensor]:
        """Returns the numbers of the step that has just ended, on the device and the same on every rank. Collective.

        `scale`: the factor by which its gradients were clipped.
        """
        parallel, found = self.session.parallel, {}
        if attention_layers(parallel.model.config):
            found["attention_logit_AH"] = max_over(largest_logits(parallel), parallel.mesh.everyone)
        if self.session.config.engine.kind is EngineKind.torch:
            found["norms_K3"] = self._norms(scale)
        return found

    def _norms(self, scale: Tensor | float) -> Tensor:
        """Returns the norms of weights, of gradients before clipping and of updates, fp64 (K, 3)."""
        parallel, optimizer = self.session.parallel, self.session.engine.optimizer
        squares_K3 = torch.zeros(len(KINDS), len(NORMS), dtype=torch.float64, device=parallel.device)
        muon = (isinstance(optimizer, Muon) and optimizer.squared_updates) or {}
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        for name, sharded in parallel.parameters.items():
            weight = local(sharded.parameter.data)
            gradient = None if sharded.parameter.grad is None else local(sharded.parameter.grad)
            update = muon.get(sharded.parameter)
            if update is None:
                state, pieces = optimizer.state[sharded.parameter], None
                if isinstance(optimizer, LeanAdamW):
                    pieces = optimizer.wide_chunks(sharded.parameter)
                update = squared_update(weight, state, groups[sharded.parameter], pieces)
            parts = [squared(weight), update.new_zeros(()) if gradient is None else squared(gradient) / scale**2, update]
            squares_K3[list(KINDS).index(kind_of_weight(name))] += torch.stack(parts) / sharded.replicas.size
        return sum_over(squares_K3, parallel.mesh.everyone).sqrt()


def stability_metrics(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, float]:
    """Returns the keys of metrics.jsonl; `tensors` are those of `StabilityStats`, on the host."""
    record: dict[str, float] = {}
    if "attention_logit_AH" in tensors:
        worst_A = tensors["attention_logit_AH"].amax(1)
        worst = int(worst_A.argmax())
        record["stability/attention_logit_max"] = worst_A[worst].item()
        record["stability/attention_logit_max_layer"] = attention_layers(model)[worst]
    for kind, norms_3 in zip(KINDS, tensors.get("norms_K3", torch.empty(0, 3)).tolist(), strict=False):
        weight, gradient, update = norms_3
        if weight:
            record |= {f"stability/weight_norm/{kind}": weight, f"stability/grad_norm/{kind}": gradient}
            record[f"stability/update_ratio/{kind}"] = update / weight
    return record


def kind_of_weight(name: str) -> str:
    """Returns one of KINDS."""
    return next(kind for kind, part in KINDS.items() if part in name)


def squared(x: Tensor) -> Tensor:
    """Returns the square of the norm, fp64."""
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).double().square()


def squared_update(
    weight: Tensor,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    pieces: Iterable[tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """Returns the square of the norm of AdamW's last update, fp64, from what it left: weights, moments and the number of steps.

    `pieces`: weights with both moments where the state has them rounded; the result is then as exact as these.

    The update is -lr (m / (sqrt(v) + epsilon) + decay w), with both moments corrected and w the weight before it.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    (beta1, beta2), decay, lr = group["betas"], group["weight_decay"], group["lr"]
    steps = float(state["step"])
    if pieces is None:
        kept = weight, state["exp_avg"], state["exp_avg_sq"]
        pieces = zip(*(local(x).flatten().split(PIECE) for x in kept), strict=True)
    for after, first, second in pieces:
        direction = first / (1 - beta1**steps) / ((second / (1 - beta2**steps)).sqrt() + group["eps"])
        before = (after + lr * direction) / (1 - lr * decay)
        total += squared(direction + decay * before)
    return total * lr**2
