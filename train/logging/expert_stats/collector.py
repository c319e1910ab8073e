"""Watching a run: sums of every step on the device, numbers of a logged step, a record of telemetry.jsonl now and then.

Nothing here waits for the device, but for a probe, and between logged steps nothing travels beside the step's own numbers. L layers
that route, E experts.
"""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....moe.router import SUMS
from ....parallel.collectives import max_over
from ...config.config import EngineKind, Tier
from ...session import Session
from ...step import StepNumbers, clip_factor
from ..metrics import routing_layers
from . import weight_stats
from .routing_probe import Probe, routers
from .step_metrics import Step, brief_metrics, layer_metrics, per_token


class HostSnapshot(NamedTuple):
    """On the host."""

    metrics: dict[str, float]
    """Keys for the record of the step."""
    record: dict[str, Any] | None
    """For telemetry.jsonl, if one is due; the vocabulary in it is that of rank 0."""


class Snapshot(NamedTuple):
    """A look at a step whose numbers are still on the device; the same on every rank."""

    tensors: dict[str, Tensor]
    describe: Callable[[Mapping[str, Tensor]], HostSnapshot]

    def seen(self, on_host: Mapping[str, Tensor] | None = None) -> HostSnapshot:
        """`on_host`: copies of the tensors; None copies them, and waits."""
        return self.describe({name: x.cpu() for name, x in self.tensors.items()} if on_host is None else on_host)


class ExpertStats:
    """On every rank. `before` and `took` around every step, `look` after those that are logged; in the same order everywhere."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session, self.settings = session, config.telemetry
        self.layers = routing_layers(config.model)
        self.on = self.settings.tier is not Tier.none and bool(self.layers)
        self.routers = routers(session.parallel, self.layers)
        self.before(logged=True)
        self.probe = Probe(session, self.layers) if self.on and self.settings.probe else None
        shape = (len(self.layers), config.model.moe.experts)
        self.used_LE = torch.full(shape, session.step, device=session.device)
        """The last step at which each expert got a token."""
        self._reset()
        self.last = session.step
        """The step that was added last."""

    def before(self, logged: bool) -> None:
        """A step begins: router metrics are computed if it is logged; compiled code is the same for all steps, and has them."""
        for router in self.routers:
            router.collects_metrics = self.on and (logged or self.session.config.compile)

    def took(self, numbers: StepNumbers) -> None:
        """Add a step's numbers."""
        if not self.on:
            return
        if self.session.step <= self.last:  # the run was rolled back, and telemetry.jsonl cut to the step it went back to
            self._reset()
            self.used_LE.clamp_(max=self.session.step - 1)
        self.last = self.session.step
        counts_LE = numbers.counts_LE[:, : self.counts_LE.shape[1]]
        self.used_LE.masked_fill_(counts_LE > 0, self.session.step)
        self.counts_LE += counts_LE
        self.dropped_L += numbers.dropped_L
        self.steps += 1
        if numbers.router_metrics_LG.numel():
            self.router_metrics_LG += numbers.router_metrics_LG
            self.measured_steps += 1

    def due(self, step: int) -> bool:
        """Whether a record is, whatever else happens after this step; the step is to be logged then."""
        return self.on and step % self.settings.every == 0

    def look(self, numbers: StepNumbers, validated: bool, saves: bool) -> Snapshot:
        """After a logged step, which was followed by a validation, or will be by a checkpoint, or neither. Collective."""
        if not self.on:
            return Snapshot({}, lambda _: HostSnapshot({}, None))
        step, tensors, record = self.session.step, self._step(numbers), None
        if self.due(step) or validated or saves:
            begin = perf_counter()
            tensors |= self._sums() | self._gradients(numbers)
            record = {"step": step, "steps": self.steps, "gauged": self.measured_steps, "layers": self.layers}
            if self.probe is not None and validated:
                record |= self._probed(self.probe)
            self._reset()
            record["seconds"] = perf_counter() - begin
        return Snapshot(tensors, lambda on_host: self._describe(on_host, record))

    def _step(self, numbers: StepNumbers) -> dict[str, Tensor]:
        """Of the step: one more small all-reduce, of maxima."""
        parallel, found = self.session.parallel, {}
        if (bias_LE := weight_stats.biases(parallel)) is not None:
            found["bias_LE"] = bias_LE
        return found | {
            "step_counts_LE": numbers.counts_LE[:, : self.counts_LE.shape[1]],
            "step_dropped_L": numbers.dropped_L,
            "step_router_metrics_LG": numbers.router_metrics_LG,
            "peaks_LP": max_over(numbers.own_LP.clone(), parallel.mesh.everyone),
            "dead_LE": self.used_LE <= self.session.step - self.settings.window,
        }

    def _sums(self) -> dict[str, Tensor]:
        """What was added up since the last record."""
        return {"counts_LE": self.counts_LE, "dropped_L": self.dropped_L, "router_metrics_LG": self.router_metrics_LG}

    def _gradients(self, numbers: StepNumbers) -> dict[str, Tensor]:
        """Norms; torch's engine alone leaves the gradients where they can be seen."""
        config = self.session.config
        if config.engine.kind is not EngineKind.torch:
            return {}
        clip = config.optimizer.clip_norm
        scale = 1.0 if clip is None else clip_factor(numbers.gradient_norm, clip)
        norms = weight_stats.gradient_norms(self.session.parallel, self.layers, scale)
        return {"grad_norm_LE": norms.experts_LE, "grad_norm_router": norms.router}

    def _describe(self, found: Mapping[str, Tensor], record: dict[str, Any] | None) -> HostSnapshot:
        """`found`: all tensors of a look, on the host."""
        step = Step(
            self.layers,
            *(found[name] for name in ("step_counts_LE", "step_dropped_L", "step_router_metrics_LG", "peaks_LP")),
            ranks=self.session.parallel.mesh.world,
            dead=int(found["dead_LE"].sum()),
            bias_LE=found.get("bias_LE"),
        )
        metrics = brief_metrics(step)
        if self.settings.tier is Tier.detailed:
            metrics |= layer_metrics(step)
        if record is None:
            return HostSnapshot(metrics, None)
        if "grad_norm_LE" in found:
            metrics["grad_norm_experts"] = found["grad_norm_LE"].square().sum().sqrt().item()
            metrics["grad_norm_router"] = found["grad_norm_router"].item()
        return HostSnapshot(metrics, record | described(found))

    def _probed(self, probe: Probe) -> dict[str, Any]:
        """What the probe found; layers of multi-token prediction, which it does not see, have zeros or null."""
        found = probe.look()
        more = len(self.layers) - len(probe.layers)
        none_E = [0] * self.counts_LE.shape[1]
        for name in ("classes", "sources"):
            for rows in found.get(name, {}).values():
                rows += [none_E] * more
        for name in ("stability_L", "saturation_L"):
            if name in found:
                found[name] += [None] * more
        alike = weight_stats.similarity(self.session.parallel, self.layers, probe.picked)
        return found | {"similarity": {str(layer): cosines_EE.tolist() for layer, cosines_EE in alike.items()}}

    def _reset(self) -> None:
        """New tensors: the old ones may be on their way to the host."""
        self.counts_LE = torch.zeros(self.used_LE.shape, dtype=torch.int64, device=self.session.device)
        self.dropped_L = self.counts_LE.new_zeros(len(self.layers))
        self.router_metrics_LG = torch.zeros(len(self.layers), len(SUMS), dtype=torch.float64, device=self.session.device)
        self.steps = 0
        """Added up since the last record."""
        self.measured_steps = 0
        """Those of them that had router metrics."""


def described(found: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sums and norms as telemetry.jsonl has them."""
    router_metrics_LG = found["router_metrics_LG"]
    record = {
        "tokens_L": router_metrics_LG[:, SUMS.index("tokens")].long().tolist(),
        "counts_LE": found["counts_LE"].tolist(),
        "dropped_L": found["dropped_L"].tolist(),
        "rows_L": router_metrics_LG[:, SUMS.index("rows")].long().tolist(),
        "router_entropy_L": per_token(router_metrics_LG, "entropy").tolist(),
        "top1_L": per_token(router_metrics_LG, "top1").tolist(),
        "dead_LE": found["dead_LE"].long().tolist(),
    }
    return record | {name: found[name].tolist() for name in ("bias_LE", "grad_norm_LE") if name in found}
