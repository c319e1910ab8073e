"""The configuration of a run. Sections are declared next to their consumers; the YAML files in conf/ hold only differences."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...data.batch_sizes import BatchSizes
from ...data.config import DataConfig, TokenizerConfig
from ...moe.config import ModelConfig
from ...parallel.config import ParallelConfig
from ...ranges import within
from .evaluate import EvaluateConfig, SampleConfig
from .launch import LaunchConfig
from .matrices import MuonConfig, OptimizerName

# The statistics of experts.


class Tier(Enum):
    none = "none"
    brief = "brief"
    detailed = "detailed"


@dataclass
class TelemetryConfig:
    tier: Tier = Tier.brief
    """none: load and drops; brief: at most 25 moe/ keys; detailed: also a few for each layer, stability/ keys, and images with each
    record."""
    every: int = field(default=25, metadata=within("[1, inf)"))
    """Steps between records of telemetry.jsonl; each evaluation and checkpoint adds one."""
    probe: int = field(default=4, metadata=within("[0, inf)"))
    """Validation sequences that are routed at each evaluation to see how experts specialise; 0 for none."""
    window: int = field(default=100, metadata=within("[1, inf)"))
    """Steps without a token after which an expert counts as dead."""


# What a run does about wrong numbers, and the checks that it makes.


class OnFault(Enum):
    """What to do about a step whose numbers are not finite."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnSpike(Enum):
    report = "report"
    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class OnDivergence(Enum):
    stop = "stop"
    repair = "repair"


@dataclass
class NumericsConfig:
    on_nan: OnFault = OnFault.stop
    """If loss or gradient of any rank are NaN or infinite, also when the step is repeated: stop; skip the update; or rollback to
    the newest checkpoint and skip the batch."""
    max_skips: int = field(default=8, metadata=within("[0, inf)"))
    """Skipped or rolled back steps after which a run stops."""
    spike_sigma: float | None = field(default=6.0, metadata=within("(0, inf)"))
    """A loss or gradient norm this many standard deviations above the mean of the last steps is a spike; a norm must also exceed 3
    times the mean; null disables the check."""
    spike_window: int = field(default=128, metadata=within("[8, inf)"))
    """Steps in that mean; the check begins after a quarter of them, at least 8."""
    on_spike: OnSpike = OnSpike.report
    """If a spike comes again when the step is repeated: report it and update; the others as for on_nan."""


@dataclass
class DebugConfig:
    dry_step: bool | None = None
    """Before the first step try the largest batch without an update, a small checkpoint, the disk and the trackers; null: with more
    than one rank, but not when the launcher restarts them."""
    collectives: bool = False
    """Compare (collective, layer, rows) over the ranks before each of tokenyard's collectives; slow."""
    replicas_every: int = field(default=100, metadata=within("[0, inf)"))
    """Steps between comparisons of replicated weights, which are also compared before a checkpoint; 0 never."""
    on_divergence: OnDivergence = OnDivergence.repair
    """If they differ: repair copies them from the majority, and stops if there is none or the same rank differs again."""
    stragglers_every: int = field(default=10, metadata=within("[0, inf)"))
    """Steps between comparisons of the time that ranks spend outside of collectives; 0 never."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line with key, value, rule and the nearest valid value."""

    @classmethod
    def of(cls, key: str, value: object, rule: str, nearest: str) -> "ConfigError":
        """`nearest`: the overrides to write instead."""
        return cls(" ".join(f"{key}={value}: {rule}; nearest valid: {nearest}".split()))


class Precision(Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp64 = "fp64"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ScheduleUnit(Enum):
    steps = "steps"
    tokens = "tokens"


class DecayCurve(Enum):
    linear = "linear"
    sqrt = "sqrt"


class Shape(Enum):
    cosine = "cosine"
    wsd = "wsd"
    multistep = "multistep"
    constant = "constant"


OnFailure = Enum("OnFailure", {"continue": "continue", "stop": "stop"})


class EngineKind(Enum):
    torch = "torch"
    deepspeed = "deepspeed"


@dataclass
class BatchConfig:
    sequences: int = field(default=16, metadata=within("[1, inf)"))
    """Sequences in the global batch of one optimizer step."""
    micro: int | None = field(default=None, metadata=within("[1, inf)"))
    """Sequences per rank and micro-batch; null: all sequences of a rank in a batch of batch.sequences."""
    schedule: list[float] = field(default_factory=list)
    """Pairs of tokens and sequences, flattened, as [1e9, 64, 5e9, 128]: the sequences of a batch once a run has trained on as many
    tokens."""

    def sizes(self, sequence_length: int) -> BatchSizes:
        """Returns the number of sequences of each step."""
        return BatchSizes(self.sequences, self.schedule, sequence_length)


@dataclass
class RunConfig:
    dir: str | None = None
    """The run folder; null: runs/<date>-<time>."""
    name: str | None = None
    """The name in trackers; null: the name of the run folder."""


class OptimizerStates(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class GradientDtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class OptimizerConfig:
    name: OptimizerName = OptimizerName.adamw
    """adamw; or muon for matrices, and AdamW for embedding, head, norms, biases, sinks and routers."""
    lr: float = field(default=5e-3, metadata=within("(0, inf)"))
    """Peak learning rate, of AdamW and of Muon."""
    beta1: float = field(default=0.9, metadata=within("[0, 1)"))
    """Decay of the first moment."""
    beta2: float = field(default=0.95, metadata=within("[0, 1)"))
    """Decay of the second moment."""
    epsilon: float = field(default=1e-6, metadata=within("(0, inf)"))
    """Added to the root of the second moment; with 1e-8 AdamW makes full steps of rounding noise: fp32 layouts diverge sooner."""
    weight_decay: float = field(default=0.1, metadata=within("[0, inf)"))
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    clip_norm: float | None = field(default=1.0, metadata=within("(0, inf)"))
    """The norm to which larger gradients are scaled down; null: no clipping."""
    states: OptimizerStates = OptimizerStates.fp32
    """Moments between steps: fp32: as the weights; bf16: stochastically rounded; int8: 8 bits, in blocks (Dettmers et al. 2022)."""
    offload: bool = False
    """Keep moments in the memory of the host; the update copies them to the device and back, chunk by chunk."""
    gradients: GradientDtype = GradientDtype.fp32
    """Gradients of matrices between passes: fp32: as the weights; bf16: rounded after each micro-batch, in half the bytes."""
    qk_clip: float | None = field(default=None, metadata=within("(0, inf)"))
    """After a step, heads with a larger attention logit get queries and keys scaled down to it (Kimi K2: 100); null: never."""
    muon: MuonConfig = field(default_factory=MuonConfig)

    @property
    def of_matrices(self) -> MuonConfig | None:
        """The settings by which matrices are updated, if Muon does."""
        return self.muon if self.name is OptimizerName.muon else None


@dataclass
class ScheduleConfig:
    shape: Shape = Shape.cosine
    """cosine: down to `final` over the whole run; wsd: warm-up, stable, decay (MiniCPM); multistep: the root of `final` after 80 %
    of the run, `final` after 90 % (DeepSeek); constant: no decay."""
    unit: ScheduleUnit = ScheduleUnit.steps
    """What the curve, `warmup` and `decay` count: steps, or the tokens of their batches, which differ with batch.schedule."""
    warmup: int = field(default=40, metadata=within("[0, inf)"))
    """Steps, or tokens, of linear warm-up from 0."""
    decay: int | None = field(default=None, metadata=within("[1, inf)"))
    """wsd: steps, or tokens, of decay at the end; null: a fifth of the run, or what is left after `decay_from`."""
    decay_from: int | None = field(default=None, metadata=within("[1, inf)"))
    """wsd: the step after which the decay begins. With --from RUN: a new run goes on from RUN's checkpoint of this step."""
    decay_curve: DecayCurve = DecayCurve.linear
    """wsd: linear, or sqrt: 1 minus the root of the part that is done (Haegele et al. 2024)."""
    final: float = field(default=0.1, metadata=within("[0, 1]"))
    """Final learning rate as a fraction of the peak."""


@dataclass
class UpcycleConfig:
    experts: int | None = field(default=None, metadata=within("[2, 65536]"))
    """Sparse upcycling: make this many experts of each feed-forward of the dense model of checkpoint.init; null: none."""
    top_k: int = field(default=2, metadata=within("[2, inf)"))
    """Experts of a token, whose outputs then add up to that of the dense model."""
    granularity: int = field(default=1, metadata=within("[1, inf)"))
    """Slices into which the hidden units of each copy are cut (He et al. 2024); experts and top_k count slices."""


@dataclass
class LocalTierConfig:
    folder: str | None = None
    """A folder in each host's memory or on its own disk, as /dev/shm/tokenyard, for fast saves that a lost host does not lose: the
    next host has copies. null: none."""
    every: int = field(default=10, metadata=within("[1, inf)"))
    """Steps between saves to that folder."""


@dataclass
class CheckpointConfig:
    every: int = field(default=250, metadata=within("[0, inf)"))
    """Steps between checkpoints; 0 saves only at the end."""
    init: str | None = None
    """A new run starts from these weights alone: a checkpoint, a run folder or a Hugging Face folder, which also gives model and
    tokenizer."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    resume: str = "auto"
    """auto: resume from the newest undamaged checkpoint of the run folder, if any; never; or the path of a checkpoint."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory; false waits until the checkpoint is durable."""
    staging_gb: float | None = field(default=None, metadata=within("[0.001, inf)"))
    """Host memory (GB; pinned on a GPU) that each rank's asynchronous saves copy into; null: as much as its shards take. With less,
    a save copies and writes in turns, and the next update waits for the last copy."""
    on_failure: OnFailure = OnFailure["continue"]
    """If a checkpoint cannot be written: continue: report it and go on; stop: end the run with exit code 74."""
    timeout_seconds: float = field(default=1800.0, metadata=within("(0, inf)"))
    """Seconds after which a save counts as failed."""
    keep: int = field(default=2, metadata=within("[1, inf)"))
    """Newest checkpoints to keep. At least one that was verified is always kept."""
    keep_every: int = field(default=0, metadata=within("[0, inf)"))
    """Checkpoints whose step is a multiple of this are kept for good; 0: none."""
    keep_best: int = field(default=0, metadata=within("[0, inf)"))
    """Checkpoints with the lowest validation loss to keep, of those written right after an evaluation."""
    local: LocalTierConfig = field(default_factory=LocalTierConfig)


@dataclass
class TrackerConfig:
    names: list[str] = field(default_factory=lambda: ["wandb"])
    """Trackers: any of wandb, tensorboard, trackio. metrics.jsonl is always written."""
    project: str = "tokenyard"
    """Project of W&B and trackio."""


@dataclass
class LogConfig:
    every: int | None = field(default=None, metadata=within("[1, inf)"))
    """Steps between lines on the console and in metrics.jsonl; null: 10 on a GPU, 1 on a CPU."""


@dataclass
class ProfileConfig:
    steps: str | None = None
    """Steps to trace with torch.profiler, as 10-12 or 10: a trace that Perfetto opens and a table, in RUN/profile; null: none."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """The ranks that are traced."""
    memory: bool = False
    """On a GPU: record allocations, and write a snapshot of them on `touch RUN/snapshot` and when memory runs out. With
    profile.steps also the bytes of operators, on a CPU too."""

    def span(self, steps: int) -> range:
        """Returns the steps of a run of `steps` that are traced. Raises ValueError if they are not written as 10-12 or 10."""
        if self.steps is None:
            return range(0)
        first, dash, last = self.steps.partition("-")
        begin, end = int(first), int(last if dash else first)
        if not 1 <= begin <= end <= steps:
            raise ValueError(f"{self.steps} is not in steps 1 to {steps}")
        return range(begin, end + 1)


@dataclass
class EngineConfig:
    kind: EngineKind = EngineKind.torch
    """What runs the backward pass, the gradient reduction and the update; the numbers are the same."""
    zero: int = field(default=0, metadata=within("[0, 4)"))
    """deepspeed: the ZeRO stage. 0 shards nothing, 1 the optimizer state, 2 also the gradients."""
    extra: dict[str, Any] = field(default_factory=dict)
    """deepspeed: further settings of its JSON file; the others follow from this configuration."""


@dataclass
class Config:
    steps: int = field(default=1150, metadata=within("[1, inf)"))
    """Optimizer steps of the run."""
    seed: int = field(default=1, metadata=within("[0, 9223372036854775808)"))
    """Seed of the initial weights and of the order of the data."""
    sequence_length: int = field(default=128, metadata=within("[1, 1073741824]"))
    """Tokens per sequence."""
    precision: Precision = Precision.auto
    """Type of activations and products; with bf16 weights stay fp32, and the router computes in fp32. auto: that of the checkpoint
    from which the run resumes, else bf16 on a GPU and fp32 on a CPU."""
    tf32: bool = True
    """With precision=fp32 on a GPU: products use TF32, with 10 bits of mantissa; those of the router never do."""
    device: Device = Device.auto
    """auto: cuda if available, else cpu. The device decides the backend: nccl or gloo."""
    compile: bool = False
    """Compile blocks with torch.compile: each as one graph if nothing in it is exchanged between ranks, else in parts;
    with pipeline_schedule=zbh1 or zbv only norms, and attention between its products."""
    cuda_graph: bool = False
    """On a GPU, after 3 steps, launch forward and backward of a micro-batch as one CUDA graph instead of kernel by kernel: on one
    GPU, with replicas, or with parallel.exchange=symmetric. Steps before and while coefficients change run without."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
