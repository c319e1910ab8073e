"""Collects statistics of the experts: sums over steps, numbers of a logged step, and at intervals a record for telemetry.jsonl.

Only the probe waits for the device, and steps that are not logged need no communication. L layers that route, E experts.
"""

from collections.abc import Mapping
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....moe.router_metrics import SUMS
from ....parallel.collectives import max_over
from ....parallel.gradients import clip_factor
from ...config.config import Config, EngineKind, Tier
from ...session import Session
from ...step import StepNumbers
from ..metrics import brief_metrics, layer_metrics, per_token, routing_layers
from ..stability import StabilityStats, stability_metrics
from . import weight_stats
from .routing_probe import Probe, routers


class Snapshot(NamedTuple):
    """The statistics of a logged step that are not among its StepNumbers; the same on every rank."""

    tensors: dict[str, Tensor]
    record: dict[str, Any] | None
    """The part of the telemetry.jsonl record that is on the host; None if no record is due. Its vocabulary is that of rank 0."""


class ExpertStats:
    """Collects on every rank, in the same order: `begin_step` and `update` around each step, `snapshot` after a logged one."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session, self.settings = session, config.telemetry
        self.layers, self.experts = routing_layers(config.model), config.model.moe.experts
        self.on = self.settings.tier is not Tier.none and bool(self.layers)
        self.routers = routers(session.parallel, self.layers)
        self.stability = StabilityStats(session) if self.on and self.settings.tier is Tier.detailed else None
        self.begin_step(logged=True)
        self.probe = Probe(session, self.layers) if self.on and self.settings.probe else None
        self.last_used_LE = torch.full((len(self.layers), self.experts), session.step, device=session.device)
        """The last step at which each expert got a token."""
        self._reset()
        self.last_step = session.step
        """The step that was added last."""

    def begin_step(self, logged: bool) -> None:
        """Computes router metrics in a logged step only; compiled code is the same for all steps and always computes them."""
        collects = self.on and (logged or self.session.config.compile)
        for router in self.routers.values():
            router.collects_metrics = collects
        if self.session.parallel.pipeline is not None:
            self.session.parallel.pipeline.collects_metrics = collects
        if self.stability is not None:
            self.stability.begin_step(logged and self.due(self.session.step + 1))

    def update(self, numbers: StepNumbers) -> None:
        """Adds a step's numbers to the sums."""
        if not self.on:
            return
        step = self.session.step
        if step <= self.last_step:  # a rollback has cut telemetry.jsonl back to the step it returned to
            self._reset()
            self.last_used_LE.clamp_(max=step - 1)
        self.last_step = step
        counts_LE = numbers.counts_LE[:, : self.experts]
        self.last_used_LE.masked_fill_(counts_LE > 0, step)
        self.counts_LE += counts_LE
        self.dropped_L += numbers.dropped_L
        self.steps += 1
        if numbers.router_metrics_LG.numel():
            self.router_metrics_LG += numbers.router_metrics_LG
            self.measured_steps += 1

    def due(self, step: int) -> bool:
        """Whether `step` must be logged because a record of telemetry.jsonl follows it."""
        return self.on and step % self.settings.every == 0

    def snapshot(self, numbers: StepNumbers, validated: bool, saves: bool) -> Snapshot | None:
        """Returns the statistics of a logged step, None if off. A validation or checkpoint makes a record due. Collective."""
        if not self.on:
            return None
        step, parallel, record = self.session.step, self.session.parallel, None
        tensors = {
            "peaks_LP": max_over(numbers.local_peaks_LP.clone(), parallel.mesh.everyone),
            "dead_LE": self.last_used_LE <= step - self.settings.window,
        }
        if (bias_LE := weight_stats.biases(parallel)) is not None:
            tensors["bias_LE"] = bias_LE
        if self.due(step) or validated or saves:
            begin = perf_counter()
            tensors |= {"counts_LE": self.counts_LE, "dropped_L": self.dropped_L, "router_metrics_LG": self.router_metrics_LG}
            clip = self.session.config.optimizer.clip_norm
            scale = 1.0 if clip is None else clip_factor(numbers.gradient_norm, clip)
            tensors |= self._gradient_norms(scale)
            if self.stability is not None and self.due(step):
                tensors |= self.stability.tensors(scale)
            record = {"step": step, "steps": self.steps, "gauged": self.measured_steps, "layers": self.layers}
            if self.probe is not None and validated:
                record |= self._probe(self.probe)
            self._reset()
            record["seconds"] = perf_counter() - begin
        return Snapshot(tensors, record)

    def _gradient_norms(self, scale: Tensor | float) -> dict[str, Tensor]:
        """Returns norms of the clipped gradients; only the torch engine leaves the gradients where they can be read."""
        if self.session.config.engine.kind is not EngineKind.torch:
            return {}
        norms = weight_stats.gradient_norms(self.session.parallel, self.layers, scale)
        return {"grad_norm_LE": norms.experts_LE, "grad_norm_router": norms.router}

    def _probe(self, probe: Probe) -> dict[str, Any]:
        """Runs the probe. Layers of multi-token prediction, which it does not see, get zeros or null."""
        found = probe.run()
        missing = len(self.layers) - len(probe.layers)
        for name in ("classes", "sources"):
            for rows in found.get(name, {}).values():
                rows += [[0] * self.experts] * missing
        for name in ("stability_L", "saturation_L"):
            if name in found:
                found[name] += [None] * missing
        alike = weight_stats.similarity(self.session.parallel, self.layers, probe.picked)
        return found | {"similarity": {str(layer): cosines_EE for layer, cosines_EE in alike.items()}}

    def _reset(self) -> None:
        """Starts new sums in new tensors: the old ones may still be on their way to the host."""
        self.counts_LE = torch.zeros_like(self.last_used_LE)
        self.dropped_L = self.counts_LE.new_zeros(len(self.layers))
        self.router_metrics_LG = torch.zeros(len(self.layers), len(SUMS), dtype=torch.float64, device=self.session.device)
        self.steps = 0
        """Steps added since the last record."""
        self.measured_steps = 0
        """Those of them that had router metrics."""


def snapshot_records(
    numbers: StepNumbers, snapshot: Snapshot, config: Config, ranks: int
) -> tuple[dict[str, float], dict[str, Any] | None]:
    """Returns a logged step's keys for metrics.jsonl and its record for telemetry.jsonl, if one is due.

    Reads all tensors, so those of `numbers` and `snapshot` should be on the host.
    """
    tensors = snapshot.tensors
    metrics = brief_metrics(numbers, tensors, config.model, ranks)
    if config.telemetry.tier is Tier.detailed:
        metrics |= layer_metrics(numbers, config.model) | stability_metrics(tensors, config.model)
    if snapshot.record is None:
        return metrics, None
    if "grad_norm_LE" in tensors:
        metrics["grad_norm_experts"] = tensors["grad_norm_LE"].square().sum().sqrt().item()
        metrics["grad_norm_router"] = tensors["grad_norm_router"].item()
    return metrics, snapshot.record | telemetry_sums(tensors)


def telemetry_sums(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns sums, biases and norms under their keys in telemetry.jsonl; tables of floats stay tensors, for a journal."""
    router_metrics_LG = tensors["router_metrics_LG"]
    record = {
        "tokens_L": router_metrics_LG[:, SUMS.index("tokens")].long().tolist(),
        "counts_LE": tensors["counts_LE"].tolist(),
        "dropped_L": tensors["dropped_L"].tolist(),
        "rows_L": router_metrics_LG[:, SUMS.index("rows")].long().tolist(),
        "router_entropy_L": per_token(router_metrics_LG, "entropy").tolist(),
        "top1_L": per_token(router_metrics_LG, "top1").tolist(),
        "dead_LE": tensors["dead_LE"].long().tolist(),
    }
    arrays = ("bias_LE", "grad_norm_LE", "attention_logit_AH")
    return record | {name: tensors[name] for name in arrays if name in tensors}
