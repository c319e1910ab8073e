"""What a run's own layout should need and take, known before its first step: `tokenyard train` prints it, and what it measured.

train/ may import this module of plan/ alone (tests/test_layers.py): it and what it imports know of train/ only the configuration.
It takes milliseconds, imports no torch and never ends a run: what is not known is said in words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..train.config.config import Config, EngineKind, Precision
from ..train.config.gpus import Gpu, gpu_of_device
from ..train.config.model_summary import per_rank, training_bytes, without_second_moment
from ..train.config.number_format import gigabytes
from .coefficients import measured_on
from .gpu_cluster import Cluster
from .model_work import ModelWork
from .rank_memory import MemoryModel
from .search import RESERVED, TIGHT, Fit
from .step_time import StepTime, predict
from .workload import RECOMPUTED, StepBatch


@dataclass(frozen=True)
class OwnPlan:
    """Of rank 0, in bytes and seconds; None for what is not known, which `unknown` explains."""

    memory: int | None = None
    """The most bytes of tensors in a step; without activations if `gpu` is None."""
    parts: Mapping[str, int] = field(default_factory=dict)
    """What `memory` is for."""
    fullest: tuple[int, int] | None = None
    """The bytes of the place in the pipeline whose ranks need most, and that place."""
    gpu: str | None = None
    """The device's name in conf/cluster/, on a GPU that is there."""
    usable: float | None = None
    """Bytes that a GPU has for tensors."""
    time: StepTime | None = None
    measured_on: str | None = None
    """The GPU whose measurements the predicted time uses."""
    unknown: tuple[str, ...] = ()

    @property
    def fit(self) -> Fit | None:
        if self.fullest is None or self.usable is None:
            return None
        share = self.fullest[0] / self.usable
        return Fit.out if share > 1 else Fit.tight if share > TIGHT else Fit.fits

    def record(self) -> dict[str, object]:
        """Returns the facts of the event `planned`."""
        time = self.time
        return {
            "gpu": self.gpu,
            "memory_bytes": self.memory,
            "memory_parts": dict(self.parts),
            **({} if self.fullest is None else {"fullest_bytes": self.fullest[0], "fullest_stage": self.fullest[1]}),
            **({} if self.fit is None else {"verdict": self.fit.value}),
            **({} if time is None else {"step_seconds": time.likely, "step_seconds_range": [time.low, time.high], "mfu": time.mfu}),
            **({"unknown": list(self.unknown)} if self.unknown else {}),
        }

    def sentences(self) -> list[str]:
        """Returns the lines for the table at the start of a run."""
        said = []
        if self.memory is not None and self.fullest is None:
            said.append(f"{gigabytes(self.memory)} of weights, gradients and moments on rank 0; the rest is planned for GPUs alone")
        elif self.memory is not None and self.fullest is not None:
            most, place = self.fullest
            other = f", {gigabytes(most)} in stage {place} of the pipeline" if most > self.memory else ""
            room = "" if self.usable is None or self.fit is None else f", of {gigabytes(self.usable)}: {self.fit.value}"
            said.append(f"{gigabytes(self.memory)} at the peak of a step on rank 0{other}{room}")
        if self.time is not None:
            time = self.time
            rates = f", by rates measured on {self.measured_on}" if self.measured_on not in (None, self.gpu) else ""
            said.append(f"{time.low:.3g} to {time.high:.3g} s a step, {time.likely:.3g} the likeliest, MFU {time.mfu:.1%}{rates}")
        return [*said, *self.unknown]


def plan_own_layout(config: Config, world: int, node: int, device: str | None) -> OwnPlan:
    """Returns the plan of a run on `world` ranks, `node` of them on a host. Never raises.

    `device`: torch's name of the GPU; None on a CPU.
    """
    try:
        if config.engine.kind is EngineKind.deepspeed:
            return OwnPlan(unknown=("not known for DeepSpeed's engine",))
        if device is None:
            parts = training_bytes(per_rank(config, world)["total"], config.precision, without_second_moment(config, world))
            return OwnPlan(parts.pop("total"), parts)
        return _on_gpus(config, world, node, device)
    except Exception as error:  # a plan is a help: its faults are no reason to end a run
        return OwnPlan(unknown=(f"not known ({type(error).__name__}: {' '.join(str(error).split())})",))


def _on_gpus(config: Config, world: int, node: int, device: str) -> OwnPlan:
    parallel, gpu, unknown = config.parallel, gpu_of_device(device), list[str]()
    memory, parts, fullest, time = None, dict[str, int](), None, None
    linear = sum(map(config.model.linear_layer, range(config.model.layers)))
    if linear:
        unknown.append(f"memory not known: of {linear} layers of gated DeltaNet only the dry run knows it")
    elif parallel.recompute not in RECOMPUTED:
        unknown.append(f"memory and time not known with parallel.recompute={parallel.recompute.value}")
    else:
        model = MemoryModel(config.model, config.precision, config.sequence_length, node=node, muon=config.optimizer.of_matrices)
        given = parallel, world, config.batch.sequences, config.batch.micro
        own, most = model.of_rank(*given), model.memory(*given)
        memory, parts, fullest = own.peak, dict(own.parts), (most.peak, most.rank)
    if gpu is None:
        unknown.append(f"time not known: conf/cluster/ has no {device}")
    elif config.precision is not Precision.bf16:
        unknown.append(f"time not known with precision={config.precision.value}, only with bf16")
    elif parallel.recompute in RECOMPUTED:
        time = _time(config, world, gpu)
    usable = None if gpu is None else gpu.memory_bytes - RESERVED
    return OwnPlan(memory, parts, fullest, gpu and gpu.name, usable, time, measured_on(), tuple(unknown))


def _time(config: Config, world: int, gpu: Gpu) -> StepTime:
    parallel, sequences = config.parallel, config.batch.sequences
    own = sequences * parallel.tensor * parallel.context * parallel.pipeline // world
    batch = StepBatch(sequences, config.batch.micro or own)
    return predict(ModelWork(config.model, config.sequence_length), parallel, batch, Cluster(gpu, world))
