"""The one configuration of a run. Each part is declared beside its consumer; the YAML files in conf/ say only what differs."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ...data.config import DataConfig, TokenizerConfig
from ...moe.config import ModelConfig
from ...parallel.config import ParallelConfig
from ...ranges import within
from .launch import LaunchConfig

# How closely the experts are watched.


class Tier(Enum):
    none = "none"
    brief = "brief"
    detailed = "detailed"


@dataclass
class TelemetryConfig:
    tier: Tier = Tier.brief
    """none: load and drops; brief: at most 25 moe/ keys; detailed: also a few for each layer, and images with each record."""
    every: int = field(default=25, metadata=within("[1, inf)"))
    """Steps between records of telemetry.jsonl; there is one with each evaluation and checkpoint too."""
    probe: int = field(default=4, metadata=within("[0, inf)"))
    """Validation sequences that are routed at each evaluation to see how experts specialise; 0 for none."""
    window: int = field(default=100, metadata=within("[1, inf)"))
    """An expert is dead that got no token for so many steps."""


# What a run does about numbers that cannot be right, and what it checks on the way.


class OnFault(Enum):
    """What is done about a step that must not be taken as it is."""

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
    """A NaN or infinite loss or gradient, on any rank, twice in a row: stop; skip the update; or rollback to the newest checkpoint
    and jump over the batch."""
    max_skips: int = field(default=8, metadata=within("[0, inf)"))
    """Steps of a run that are skipped or rolled back before it stops all the same."""
    spike_sigma: float | None = field(default=6.0, metadata=within("(0, inf)"))
    """A loss or gradient norm so many standard deviations above those of the last steps is a spike, a norm only if it is also more
    than 3 times their mean; null looks for none."""
    spike_window: int = field(default=128, metadata=within("[8, inf)"))
    """Steps that a spike is compared with; none is looked for before a quarter of them, at least 8."""
    on_spike: OnSpike = OnSpike.report
    """What is done about a spike that comes again when the step is repeated: report updates and says so; else as on_nan."""


@dataclass
class DebugConfig:
    dry_step: bool | None = None
    """Before the first step try the largest batch without an update, a small checkpoint, the disk and the trackers; null: with more
    than one rank, but not when the launcher starts them again."""
    collectives: bool = False
    """Compare (collective, layer, rows) over the ranks before each collective of ours; slow."""
    replicas_every: int = field(default=100, metadata=within("[0, inf)"))
    """Steps between comparisons of the weights that must be equal on several ranks; also before a checkpoint; 0 never."""
    on_divergence: OnDivergence = OnDivergence.repair
    """When they differ: repair copies them from the majority, and stops if there is none or the same rank differs again."""
    stragglers_every: int = field(default=10, metadata=within("[0, inf)"))
    """Steps between comparisons of the ranks' own time; 0 never."""


class ConfigError(ValueError):
    """A configuration that cannot run: one line with key, value, rule and the nearest valid value."""

    @classmethod
    def of(cls, key: str, value: object, rule: str, nearest: str) -> "ConfigError":
        """`nearest` is what to write instead, as overrides."""
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


class Shape(Enum):
    cosine = "cosine"
    wsd = "wsd"
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
    """Sequences per rank and micro-step; null takes all of a rank's sequences at once."""


@dataclass
class RunConfig:
    dir: str | None = None
    """The run folder; null makes runs/<date>-<time>."""
    name: str | None = None
    """Name shown by trackers; null is the run folder's name."""


@dataclass
class OptimizerConfig:
    lr: float = field(default=5e-3, metadata=within("(0, inf)"))
    """Peak learning rate of AdamW."""
    beta1: float = field(default=0.9, metadata=within("[0, 1)"))
    """Decay of the first moment."""
    beta2: float = field(default=0.95, metadata=within("[0, 1)"))
    """Decay of the second moment."""
    epsilon: float = field(default=1e-6, metadata=within("(0, inf)"))
    """Added to the root of the second moment. With 1e-8 AdamW makes whole steps of rounding noise, and fp32 layouts part sooner."""
    weight_decay: float = field(default=0.1, metadata=within("[0, inf)"))
    """Decoupled weight decay of matrices; vectors (norms, biases) get none."""
    clip_norm: float | None = field(default=1.0, metadata=within("(0, inf)"))
    """Gradients are scaled down to this norm; null does not clip."""


@dataclass
class ScheduleConfig:
    shape: Shape = Shape.cosine
    """cosine: to `final` over the whole run; wsd: warm-up, stable, decay (MiniCPM); constant: warm-up only."""
    warmup: int = field(default=40, metadata=within("[0, inf)"))
    """Steps of linear warm-up from 0."""
    decay: int | None = field(default=None, metadata=within("[1, inf)"))
    """wsd: steps of linear decay at the end; null is a fifth of the run."""
    final: float = field(default=0.1, metadata=within("[0, 1]"))
    """Learning rate at the end, as a share of the peak."""


@dataclass
class EvaluateConfig:
    every: int = field(default=250, metadata=within("[0, inf)"))
    """Steps between evaluations; 0 evaluates only at the end."""
    sequences: int = field(default=512, metadata=within("[1, inf)"))
    """Validation sequences of one evaluation."""


@dataclass
class CheckpointConfig:
    every: int = field(default=250, metadata=within("[0, inf)"))
    """Steps between checkpoints; 0 saves only at the end."""
    resume: str = "auto"
    """auto: the newest checkpoint of the run folder that is whole, if there is one; never; or the path of a checkpoint."""
    asynchronous: bool = True
    """Write beside the training, from a copy in host memory; false waits until the checkpoint is durable."""
    on_failure: OnFailure = OnFailure["continue"]
    """When a checkpoint cannot be written. continue: say so, and wait for the next one; stop: end the run with exit code 74."""
    timeout_seconds: float = field(default=1800.0, metadata=within("(0, inf)"))
    """Seconds after which a save counts as failed."""
    keep: int = field(default=2, metadata=within("[1, inf)"))
    """Newest checkpoints that are kept. One that was found whole always is."""
    keep_every: int = field(default=0, metadata=within("[0, inf)"))
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for that."""
    keep_best: int = field(default=0, metadata=within("[0, inf)"))
    """Checkpoints with the lowest validation loss that are kept, of those written right after an evaluation."""


@dataclass
class TrackerConfig:
    names: list[str] = field(default_factory=lambda: ["wandb"])
    """Views of metrics.jsonl: wandb, tensorboard, trackio; several at once. metrics.jsonl itself is always written."""
    project: str = "tokenyard"
    """Project of W&B and trackio."""


@dataclass
class LogConfig:
    every: int | None = field(default=None, metadata=within("[1, inf)"))
    """Steps between lines of the console and of metrics.jsonl; null is 10 on a GPU and 1 on a CPU."""


@dataclass
class EngineConfig:
    kind: EngineKind = EngineKind.torch
    """Who runs backward, reduction and update; the numbers are the same."""
    zero: int = field(default=0, metadata=within("[0, 4)"))
    """deepspeed: the ZeRO stage. 0 shards nothing, 1 the optimizer's state, 2 gradients too."""
    extra: dict[str, Any] = field(default_factory=dict)
    """deepspeed: further settings of its JSON file, the rest of which is written from this configuration."""


@dataclass
class SampleConfig:
    prompt: str = "def "
    """What the sample at the end of a run continues; empty for no sample."""
    tokens: int = field(default=64, metadata=within("[0, inf)"))
    """Length of that sample."""
    temperature: float = field(default=0.8, metadata=within("[0, inf)"))
    """0 takes the likeliest token."""
    top_p: float = field(default=0.95, metadata=within("(0, 1]"))
    """Sample from the likeliest tokens that together have this probability."""


@dataclass
class Config:
    steps: int = field(default=1150, metadata=within("[1, inf)"))
    """Optimizer steps of the whole run."""
    seed: int = field(default=1, metadata=within("[0, 9223372036854775808)"))
    """Decides the initial weights and the order of the data."""
    sequence_length: int = field(default=128, metadata=within("[1, 1073741824]"))
    """Tokens per sequence."""
    precision: Precision = Precision.auto
    """Of activations and products; bf16 keeps fp32 weights, and the router is never below fp32. auto: that of the checkpoint that
    the run goes on from, else bf16 on a GPU and fp32 on a CPU."""
    tf32: bool = True
    """With precision=fp32 on a GPU: products take TF32, with 10 bits of mantissa; those of the router never do."""
    device: Device = Device.auto
    """auto: cuda if there is one, else cpu. The device decides the backend: nccl or gloo."""
    compile: bool = False
    """Compile each block with torch.compile."""
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
    engine: EngineConfig = field(default_factory=EngineConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    numerics: NumericsConfig = field(default_factory=NumericsConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
