"""Watching a run: sums of every step on the device, numbers of a logged step, a record of telemetry.jsonl now and then.

Between logged steps nothing waits for the device and nothing travels beside the step's own numbers. L layers that route, E experts.
"""

from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...moe.gauges import SUMS
from ...parallel.collectives import max_over
from ..config import Config, Engine
from ..metrics import routing_layers
from ..session import Session
from ..step import StepNumbers, clip_factor
from . import weights
from .brief import Step, brief_metrics, layer_metrics, per_token
from .config import Tier
from .probe import Probe, routers


class Seen(NamedTuple):
    """The same on every rank but for the vocabulary, which rank 0 has."""

    metrics: dict[str, float]
    """Keys for the record of the step."""
    record: dict[str, Any] | None
    """For telemetry.jsonl, if one is due."""


class Watch:
    """On every rank. `took` after every step, `look` after those that are logged; both in the same order everywhere."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session, self.settings = session, config.telemetry
        self.layers = routing_layers(config.model)
        self.on = self.settings.tier is not Tier.none and bool(self.layers)
        for router in routers(session.parallel, self.layers):
            router.gauged = self.on
        self.probe = Probe(session, self.layers) if self.on and self.settings.probe else None
        shape, device = (len(self.layers), config.model.moe.experts), session.device
        self.used_LE = torch.full(shape, session.step, device=device)
        """The last step at which each expert got a token."""
        self.counts_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self.dropped_L = self.counts_LE.new_zeros(len(self.layers))
        self.gauges_LG = torch.zeros(len(self.layers), len(SUMS), dtype=torch.float64, device=device)
        self.steps = 0
        """Added up since the last record."""
        self.last = session.step
        """The step that was added last."""

    def took(self, numbers: StepNumbers) -> None:
        """Add a step's numbers. Waits for nothing."""
        if not self.on:
            return
        if self.session.step <= self.last:  # the run was rolled back, and telemetry.jsonl cut to the step it went back to
            self._reset()
            self.used_LE.clamp_(max=self.session.step - 1)
        self.last = self.session.step
        counts_LE = numbers.counts_LE[:, : self.counts_LE.shape[1]]
        self.used_LE = self.used_LE.masked_fill(counts_LE > 0, self.session.step)
        self.counts_LE += counts_LE
        self.dropped_L += numbers.dropped_L
        self.gauges_LG += numbers.gauges_LG
        self.steps += 1

    def due(self) -> bool:
        """Whether a record is, whatever else happens after this step; the step is to be logged then."""
        step, config = self.session.step, self.session.config
        return self.on and (step % self.settings.every == 0 or table_due(config, step) or self._probes())

    def look(self, numbers: StepNumbers, validated: bool, saves: bool) -> Seen:
        """After a logged step, which was followed by a validation, or will be by a checkpoint, or neither. Collective."""
        if not self.on:
            return Seen({}, None)
        step = self._step(numbers)
        metrics = brief_metrics(step)
        if self.settings.tier is Tier.detailed:
            metrics |= layer_metrics(step)
        if not (self.due() or validated or saves):
            return Seen(metrics, None)
        begin = perf_counter()
        record = self._record(step)
        metrics |= self._gradients(record, numbers)
        if self.probe is not None and (validated or self._probes()):
            record |= self._probed(self.probe)
        self._reset()
        return Seen(metrics, record | {"seconds": perf_counter() - begin})

    def _probes(self) -> bool:
        """Whether the tier wants a probe after this step."""
        every = self.settings.probe_every
        return self.settings.tier is Tier.detailed and every > 0 and self.session.step % every == 0

    def _step(self, numbers: StepNumbers) -> Step:
        """The step on the host: one more small all-reduce, of maxima."""
        parallel = self.session.parallel
        peaks_LP = max_over(numbers.own_LP.clone(), parallel.mesh.everyone)
        dead = (self.used_LE <= self.session.step - self.settings.window).sum()
        counts_LE = numbers.counts_LE[:, : self.counts_LE.shape[1]]
        on_host = (tensor.cpu() for tensor in (counts_LE, numbers.dropped_L, numbers.gauges_LG, peaks_LP))
        return Step(self.layers, *on_host, ranks=parallel.mesh.world, dead=int(dead), bias_LE=weights.biases(parallel))

    def _record(self, step: Step) -> dict[str, Any]:
        """What was added up since the last record."""
        gauges_LG = self.gauges_LG.cpu()
        record = {
            "step": self.session.step,
            "steps": self.steps,
            "tokens_L": gauges_LG[:, SUMS.index("tokens")].long().tolist(),
            "layers": self.layers,
            "counts_LE": self.counts_LE.tolist(),
            "dropped_L": self.dropped_L.tolist(),
            "rows_L": gauges_LG[:, SUMS.index("rows")].long().tolist(),
            "router_entropy_L": per_token(gauges_LG, "entropy").tolist(),
            "top1_L": per_token(gauges_LG, "top1").tolist(),
            "dead_LE": (self.used_LE <= self.session.step - self.settings.window).long().tolist(),
        }
        return record if step.bias_LE is None else record | {"bias_LE": step.bias_LE.tolist()}

    def _gradients(self, record: dict[str, Any], numbers: StepNumbers) -> dict[str, float]:
        """Adds to `record`; torch's engine alone leaves the gradients where they can be seen."""
        config = self.session.config
        if config.engine.kind is not Engine.torch:
            return {}
        clip = config.optimizer.clip_norm
        scale = 1.0 if clip is None else clip_factor(numbers.gradient_norm, clip)
        norms = weights.gradient_norms(self.session.parallel, self.layers, scale)
        record["grad_norm_LE"] = norms.experts_LE.tolist()
        return {"grad_norm_experts": norms.experts_LE.square().sum().sqrt().item(), "grad_norm_router": norms.router}

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
        alike = weights.similarity(self.session.parallel, self.layers, probe.picked)
        return found | {"similarity": {str(layer): cosines_EE.tolist() for layer, cosines_EE in alike.items()}}

    def _reset(self) -> None:
        sums: list[Tensor] = [self.counts_LE, self.dropped_L, self.gauges_LG]
        for tensor in sums:
            tensor.zero_()
        self.steps = 0


def table_due(config: Config, step: int) -> bool:
    """Whether the console shows the layers after this step; the summary at the end has a table of its own."""
    every = config.log.layers_every
    return every > 0 and step % every == 0 and step < config.steps
