"""One configuration of each kind of router, balance loss and capacity: a part of `make gpu`, and cases for the tests."""

import dataclasses
from typing import Any

from ...moe.config import (
    BalanceConfig,
    CapacityConfig,
    DropPolicy,
    GroupScore,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    Scope,
    Score,
    Selection,
)
from .presets import compare
from .recorder import Recorder

EXPERTS = 8


def moe(router: dict[str, Any], balance: dict[str, Any] | None = None, capacity: dict[str, Any] | None = None, top_k: int = 2):
    """A layer of 8 experts with all linear losses on."""
    return MoEConfig(
        experts=EXPERTS,
        top_k=top_k,
        hidden=16,
        z_coefficient=0.01,
        router=RouterConfig(**router),
        balance=BalanceConfig(**{"coefficient": 0.05, **(balance or {})}),
        capacity=CapacityConfig(**(capacity or {})),
    )


BATCH = {"scope": Scope.batch}
V3 = {"score": Score.sigmoid, "groups": 4, "top_groups": 2, "group_score": GroupScore.top2, "scale": 2.5}

ROUTERS = {
    "softmax": moe({}),
    "softmax after top-k, bias": moe({"softmax_after_top_k": True, "bias": True}),
    "deepseek v2": moe({"groups": 4, "top_groups": 2, "normalize_top_k": False, "scale": 16.0}),
    "deepseek v2, devices": moe(
        {"groups": 4, "top_groups": 2, "normalize_top_k": False}, {"device_coefficient": 0.03, "communication_coefficient": 0.02}
    ),
    "deepseek v2, devices by batch": moe(
        {"groups": 4, "top_groups": 2}, {"device_coefficient": 0.03, "communication_coefficient": 0.02, **BATCH}, top_k=3
    ),
    "deepseek v3": moe(V3, {"sequence_coefficient": 0.02, "bias_rate": 0.01}),
    "deepseek v3 by scores": moe(
        V3, {"sequence_coefficient": 0.02, "sequence_by_scores": True, "bias_rate": 0.05, "coefficient": 0.0}
    ),
    "sqrtsoftplus": moe({"score": Score.sqrtsoftplus}, {"bias_rate": 0.05, "coefficient": 0.0}),
    "switch, jitter": moe({"jitter": 0.1}, capacity={"factor": 1.0}, top_k=1),
    "noise, importance and load": moe({"noise": True}, {"importance_coefficient": 0.1, **BATCH}),
    "importance by sequence": moe({"score": Score.sigmoid}, {"importance_coefficient": 0.1}),
    "gshard": moe({"selection": Selection.gshard}, capacity={"factor": 0.8}),
    "gshard by batch": moe({"selection": Selection.gshard}, BATCH, {"factor": 0.8, **BATCH}),
    "gshard in groups": moe({"selection": Selection.gshard}, BATCH, {"factor": 0.8, "groups": 6, **BATCH}),
    "batch-prioritized": moe({}, capacity={"factor": 0.7, "policy": DropPolicy.priority}, top_k=3),
    "batch-prioritized in groups": moe({}, capacity={"factor": 0.7, "policy": DropPolicy.priority, "groups": 3, **BATCH}),
    "random drops": moe({}, capacity={"factor": 0.8, "policy": DropPolicy.random}),
    "random drops by batch": moe({}, capacity={"factor": 0.8, "policy": DropPolicy.random, **BATCH}),
    "drops by probability": moe({}, BATCH, {"factor": 0.8, "policy": DropPolicy.probability, **BATCH}),
    "hash": moe({"selection": Selection.hash}),
    "sinkhorn": moe({"selection": Selection.sinkhorn}),
    "sinkhorn by batch": moe({"selection": Selection.sinkhorn, "score": Score.sigmoid}, BATCH, top_k=1),
    "expert choice": moe({"selection": Selection.expert_choice}),
    "expert choice by batch": moe({"selection": Selection.expert_choice}, BATCH, {"factor": 0.75, **BATCH}),
    "null experts": moe({"null_experts": 4}, {"bias_rate": 0.01}, {"factor": 1.0}, top_k=3),
    "copy and constant experts": moe(
        {"null_experts": 5, "copy_experts": 2, "constant_experts": 2, "scale": 2.0}, {"bias_rate": 0.01}, {"factor": 1.0}, top_k=3
    ),
    "padded": moe({}, capacity={"factor": 0.9, "pad": True}),
    "padded by batch": moe({"null_experts": 2}, capacity={"factor": 0.9, "pad": True, **BATCH}),
    "scheduled": moe({}, capacity={"schedule": [1, 0.6, 2, 1.2, 3, 0]}),
    "pooled layers": moe({}, {"pool_layers": True, **BATCH}),
    "pooled layers of sigmoids": moe(V3, {"pool_layers": True, "bias_rate": 0.05}),
}
"""The configurations by name."""

GSHARD = ("gshard", "gshard by batch", "gshard in groups")
RANDOM = ("switch, jitter", "noise, importance and load", *GSHARD, "random drops", "random drops by batch")
"""The configurations whose training is random."""


def run(recorder: Recorder) -> None:
    sizes = ModelConfig(layers=2, width=32, heads=4, kv_heads=4, hidden=48, vocabulary=64, init_std=0.2)
    for name, config in ROUTERS.items():
        compare(recorder, name, dataclasses.replace(sizes, moe=config))
