"""The plan of runs: a size, its variants with equal active parameters, and the settings of each run for `tokenyard train`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ...moe.config import ModelConfig
from ...moe.param_count import count
from ...train.config.compose import compose

BOUND = 0.02
"""By which a variant's active parameters may differ from the dense model's."""
DENSE, TUNED, MUON = "dense", "top-2", "muon"
"""The variants whose learning rates are tuned; the MoE family takes that of TUNED. MUON is TUNED with another optimizer."""
TARGETS = {TUNED: DENSE, MUON: TUNED}
"""Variants that are trained for shorter times too, and those whose final loss they have to reach."""
EXPERT_CHOICE = "expert-choice"
FP8 = {
    "fp8-rowwise": ["model.moe.products=fp8_rowwise", "model.products=fp8_rowwise"],
    "fp8-blockwise": ["model.moe.products=fp8_blockwise", "model.products=fp8_blockwise"],
    "fp8-exchange": ["model.moe.products=fp8_blockwise", "model.products=fp8_blockwise", "parallel.exchange_dtype=fp8"],
    "mxfp8": ["model.moe.products=mxfp8", "model.products=mxfp8"],
}
"""TUNED in FP8; compared with it, and run if they are asked for."""


@dataclass(frozen=True)
class Size:
    """A dense model, and how it is trained. The routed experts of a variant have `expansion` times its feed-forward weights."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    """Hidden width of all feed-forwards that a token passes, together; a multiple of 4."""
    pieces: int
    """Pieces of the tokenizer, which are the rows of the embedding."""
    sequence_length: int
    sequences: int
    """In a step."""
    steps: int
    warmup: int
    evaluate_sequences: int
    expansion: int = 8
    init_std: float = 0.02


SIZES = {
    "cpu": Size(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        hidden=256,
        pieces=1024,
        sequence_length=128,
        sequences=16,
        steps=1000,
        warmup=40,
        evaluate_sequences=256,
        init_std=0.06,
    ),
    "gpu": Size(
        layers=12,
        width=768,
        heads=12,
        kv_heads=12,
        hidden=2048,
        pieces=32000,
        sequence_length=1024,
        sequences=256,
        steps=10000,
        warmup=500,
        evaluate_sequences=2048,
    ),
}
"""cpu: one to two minutes per run on one core. gpu: 2.6 billion tokens per run, which need a larger corpus than the default."""


class TrainingRun(NamedTuple):
    variant: str
    rate: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return f"{self.variant}-rate{self.rate:g}-steps{self.steps}-seed{self.seed}"


def variants(size: Size) -> dict[str, list[str]]:
    """Returns the model settings of each variant. The dense model is wider by about the weights of the router of TUNED."""
    experts, hidden = size.expansion, size.hidden
    top_2 = _experts(2 * experts, 2, hidden // 2)
    router = 2 * experts * size.width
    wider = round(router / (3 * size.width) / 8) * 8
    return {
        DENSE: ["model.moe.experts=0", f"model.hidden={hidden + wider}"],
        "top-1": _experts(experts, 1, hidden),
        TUNED: top_2,
        "fine-grained": [*_experts(4 * experts, 3, hidden // 4), f"model.moe.shared_hidden={hidden // 4}"],
        "bias": [*top_2, "model.moe.router.score=sigmoid", "model.moe.balance.coefficient=0", "model.moe.balance.bias_rate=0.001"],
        EXPERT_CHOICE: [
            *top_2,
            "model.moe.router.selection=expert_choice",
            "model.moe.router.normalize_top_k=false",
            "model.moe.balance.coefficient=0",
        ],
        "unbalanced": [*top_2, "model.moe.balance.coefficient=0"],
        **{name: [*top_2, *narrow] for name, narrow in FP8.items()},
        "states-bf16": [*top_2, "optimizer.states=bf16"],
        "states-int8": [*top_2, "optimizer.states=int8"],
        MUON: [*top_2, "optimizer=muon"],
    }


def _experts(experts: int, top_k: int, hidden: int) -> list[str]:
    return [
        f"model.moe.experts={experts}",
        f"model.moe.top_k={top_k}",
        f"model.moe.hidden={hidden}",
        "model.moe.balance.scope=batch",
    ]


def settings(size: Size, model: list[str], more: Iterable[str] = ()) -> list[str]:
    """Returns the settings that do not depend on the run: those of the size, of the variant, and of the user, which override."""
    shape = {"layers": size.layers, "width": size.width, "heads": size.heads, "kv_heads": size.kv_heads, "vocabulary": size.pieces}
    return [
        "tracker=none",
        "telemetry.tier=none",
        "sample.prompt=",
        "checkpoint.every=0",
        "schedule=wsd",
        f"schedule.warmup={size.warmup}",
        f"tokenizer.pieces={size.pieces}",
        f"sequence_length={size.sequence_length}",
        f"batch.sequences={size.sequences}",
        f"evaluate.sequences={size.evaluate_sequences}",
        *(f"model.{key}={value}" for key, value in shape.items()),
        f"model.init_std={size.init_std}",
        *model,
        *more,
    ]


def run_settings(run: TrainingRun, evaluations: int) -> list[str]:
    """Returns the settings that depend on the run."""
    every = max(1, run.steps // evaluations)
    return [
        f"optimizer.lr={run.rate:g}",
        f"steps={run.steps}",
        f"seed={run.seed}",
        f"evaluate.every={every}",
        f"log.every={every}",
    ]


def active(model: ModelConfig) -> int:
    """Returns active parameters, router included, without embedding and head."""
    parts = count(model)
    return parts.active - parts.embedding - parts.head


def models(size: Size, chosen: Mapping[str, list[str]], more: Iterable[str] = ()) -> dict[str, ModelConfig]:
    """Returns the model of each variant.

    Raises ValueError if its active parameters differ from the dense model's by more than BOUND.
    """
    found = {name: compose(settings(size, model, more)).model for name, model in chosen.items()}
    dense = active(found[DENSE])
    for name, model in found.items():
        off = active(model) / dense - 1
        if abs(off) > BOUND:
            rule = f"must be within {BOUND:.0%} of the dense model's {dense:,}"
            raise ValueError(f"{name}: {active(model):,} active parameters, {off:+.1%}, {rule}; take a greater width or hidden")
    return found


@dataclass
class QualityPlan:
    """The runs, after tuning."""

    steps: int
    seeds: int
    shorter: list[float]
    """Shares of the steps that TARGETS are also trained for, with their learning rates decayed at the end."""
    tried: dict[str, list[list[float]]]
    """For DENSE, TUNED and perhaps MUON, pairs of a learning rate and its loss in the tuning runs."""

    def rate(self, variant: str) -> float:
        """Returns the learning rate with the lowest loss in tuning."""
        return min(self.tried.get(variant, self.tried[TUNED]), key=lambda pair: pair[1])[0]

    def full(self, variant: str, seed: int) -> TrainingRun:
        return TrainingRun(variant, self.rate(variant), self.steps, seed)

    def short(self, variant: str, share: float, seed: int) -> TrainingRun:
        return TrainingRun(variant, self.rate(variant), max(1, round(share * self.steps)), seed)

    def runs(self, chosen: Iterable[str]) -> list[TrainingRun]:
        """Returns the runs ordered by seed, so that those of the first seed finish early."""
        names = list(chosen)
        shorter = [(name, share) for name in TARGETS if name in names for share in self.shorter]
        return [
            run
            for seed in range(1, self.seeds + 1)
            for run in [*(self.full(name, seed) for name in names), *(self.short(*one, seed) for one in shorter)]
        ]
