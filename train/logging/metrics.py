"""From what a training step returns to one record of metrics.jsonl.

L layers with experts, E experts. The keys are the same for 8 experts or 512: numbers over all of them, not one per expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...moe.config import ModelConfig, MoEConfig
from ...moe.param_count import training_flops_per_token

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class StepResult:
    """What one optimizer step did, over all ranks."""

    step: int
    """The first step is 1."""
    tokens: int
    """Valid tokens of the global batch."""
    loss: float
    """Mean cross entropy per valid token, in nats."""
    loss_balance: float
    """Load-balance loss, mean over the MoE layers, without its coefficient: 1 is perfectly even; 0 for a dense model."""
    loss_z: float
    """Router z-loss, mean over the MoE layers, without its coefficient; 0 for a dense model."""
    grad_norm: float
    """Norm of the gradient of all parameters before clipping."""
    lr: float
    """Learning rate of this step."""
    counts_LE: "Tensor | Sequence[Sequence[int]]"
    """Tokens x top-k routed to each expert in the global batch, before any is dropped; int64; no rows for a dense model."""
    dropped_L: "Tensor | Sequence[int]"
    """How many of those each layer dropped; int64."""
    loss_mtp: float | None = None
    """Mean cross entropy of the modules of multi-token prediction; None without any."""
    auxiliary: dict[str, float] = field(default_factory=dict)
    """More records of routing: see `auxiliary_metrics` and `count_metrics`."""


class Meter:
    """Makes the records of metrics.jsonl. Its one state is the number of tokens trained on, which a checkpoint keeps.

    `peak_flops`: FLOP/s of all devices of the run together (train/logging/peak_flops.py). `tokens`: what a resumed run had seen.
    """

    def __init__(self, model: ModelConfig, sequence_length: int, peak_flops: float, tokens: int = 0):
        self.tokens = tokens
        self.peak_flops = peak_flops
        self.flops_per_token = training_flops_per_token(model, sequence_length)
        self.layers = routing_layers(model)

    def record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        """The record of a step that took `seconds` from batch to update. Call it once for every step, logged or not.

        mfu is model FLOPs per second over the peak: 3 x forward, active experts only, whether or not activations are recomputed.
        Attention counts as causal over the whole sequence: with data.mask_documents mfu is too high.
        """
        self.tokens += result.tokens
        per_second = result.tokens / seconds
        return {
            "step": result.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "loss_balance": result.loss_balance,
            "loss_z": result.loss_z,
            **({} if result.loss_mtp is None else {"loss_mtp": result.loss_mtp}),
            **result.auxiliary,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens_per_second": per_second,
            "step_seconds": seconds,
            "mfu": per_second * self.flops_per_token / self.peak_flops,
            **load_metrics(result.counts_LE, result.dropped_L, self.layers),
        }


def auxiliary_metrics(config: MoEConfig, means: dict[str, float], layers: int, step: int) -> dict[str, float]:
    """What each loss of routing that is on adds to the objective, and the capacity factor in force, 0 for dropless.

    `means`: the losses without coefficients, mean over the `layers` layers that route: balance, balance_sequence, importance, z.
    The optional ones of them are recorded here as they are, too.
    """
    balance = config.balance
    coefficients = {
        "balance": balance.coefficient,
        "balance_sequence": balance.sequence_coefficient,
        "importance": balance.importance_coefficient,
        "z": config.z_coefficient,
    }
    record = {}
    for kind, coefficient in coefficients.items():
        if coefficient and layers:
            record |= {f"loss_{kind}": means[kind], f"loss_{kind}_scaled": coefficient * means[kind] * layers}
    if layers and has_capacity(config):
        record["moe/capacity_factor"] = config.capacity.factor_at(step) or 0.0
    return record


def count_metrics(model: ModelConfig, counts_LE: "Tensor") -> dict[str, float]:
    """What counts say beside how even they are; `counts_LE` with the columns of null experts here, the last ones.

    With null experts `moe/null_fraction` is their share of all choices.
    """
    moe, counts = model.moe, _lists(counts_LE)
    if not (moe.router.null_experts and counts):
        return {}
    null = sum(sum(row[moe.experts :]) for row in counts)
    return {"moe/null_fraction": null / max(1, sum(map(sum, counts)))}


def routing_layers(model: ModelConfig) -> list[int]:
    """The indices of the blocks that route in training; those of multi-token prediction follow the model's own."""
    return [index for index in range(model.layers + model.mtp_depth) if model.moe_layer(index)]


def has_capacity(moe: MoEConfig) -> bool:
    """Whether training ever limits how many rows an expert takes."""
    return moe.capacity.factor is not None or bool(moe.capacity.schedule)


def load_metrics(
    counts_LE: "Tensor | Sequence[Sequence[int]]", dropped_L: "Tensor | Sequence[int]", layers: Sequence[int]
) -> dict[str, Any]:
    """How even the experts' load is, and what was dropped. `layers`: the block index of each row of counts_LE.

    `moe/load_max_over_mean` is the busiest expert's tokens over an even share, in the worst layer (which `..._layer` names);
    `..._mean` is the mean over layers; `moe/dead_experts` got no token at all. A dense model has `dropped_fraction` 0 and no more.
    """
    rows, dropped = _lists(counts_LE), _lists(dropped_L)
    if not rows:
        return {"dropped_fraction": 0.0}
    routed = sum(map(sum, rows))
    peaks = [max_over_mean(row) for row in rows]
    worst = peaks.index(max(peaks))
    return {
        "dropped_fraction": sum(dropped) / routed if routed else 0.0,
        "moe/load_max_over_mean": peaks[worst],
        "moe/load_max_over_mean_layer": layers[worst],
        "moe/load_max_over_mean_mean": sum(peaks) / len(peaks),
        "moe/load_min_over_mean": min(min_over_mean(row) for row in rows),
        "moe/dead_experts": sum(row.count(0) for row in rows),
    }


def max_over_mean(counts_E: Sequence[int]) -> float:
    """Tokens of the busiest expert over those of an even share: 1 is even, E is all on one; 0 if nothing was routed."""
    total = sum(counts_E)
    return max(counts_E) * len(counts_E) / total if total else 0.0


def min_over_mean(counts_E: Sequence[int]) -> float:
    """Tokens of the idlest expert over those of an even share: 1 is even, 0 is a dead expert."""
    total = sum(counts_E)
    return min(counts_E) * len(counts_E) / total if total else 0.0


def _lists(values: Any) -> list:
    """A nested list of python numbers; for a tensor this waits for its device."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
