"""The one configuration of a run. Each part is declared beside its consumer; the YAML files in conf/ say only what differs."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ..data.config import DataConfig, TokenizerConfig
from ..moe.config import ModelConfig
from ..parallel.config import ParallelConfig
from .launch_config import LaunchConfig
from .survival.survival_config import DebugConfig, NumericsConfig
from .telemetry.config import TelemetryConfig


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


class Engine(Enum):
    torch = "torch"
    deepspeed = "deepspeed"


@dataclass
class BatchConfig:
    sequences: int = 16
    """Sequences in the global batch of one optimizer step."""
    micro: int | None = None
    """Sequences per rank and micro-step; null takes all of a rank's sequences at once."""


@dataclass
class RunConfig:
    dir: str | None = None
    """The run folder; null makes runs/<date>-<time>."""
    name: str | None = None
    """Name shown by trackers; null is the run folder's name."""


@dataclass
class OptimizerConfig:
    lr: float = 5e-3
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-6
    """Added to the root of the second moment. With 1e-8 AdamW makes whole steps of rounding noise, and fp32 layouts part sooner."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) get none."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null does not clip."""


@dataclass
class ScheduleConfig:
    shape: Shape = Shape.cosine
    """cosine: to `final` over the whole run; wsd: warm-up, stable, decay (MiniCPM); constant: warm-up only."""
    warmup: int = 40
    """Steps of linear warm-up from 0."""
    decay: int | None = None
    """wsd: steps of linear decay at the end; null is a fifth of the run."""
    final: float = 0.1
    """Learning rate at the end, as a share of the peak."""


@dataclass
class EvaluateConfig:
    every: int = 250
    """Steps between evaluations; 0 evaluates only at the end."""
    sequences: int = 512
    """Validation sequences of one evaluation."""


@dataclass
class CheckpointConfig:
    every: int = 250
    """Steps between checkpoints; 0 saves only at the end."""
    resume: str = "auto"
    """auto: the newest checkpoint of the run folder that is whole, if there is one; never; or the path of a checkpoint."""
    asynchronous: bool = True
    """Write beside the training, from a copy in host memory; false waits until the checkpoint is durable."""
    on_failure: OnFailure = OnFailure["continue"]
    """When a checkpoint cannot be written. continue: say so, and wait for the next one; stop: end the run with exit code 74."""
    timeout_seconds: float = 1800.0
    """Seconds after which a save counts as failed."""
    keep: int = 2
    """Newest checkpoints that are kept. One that was found whole always is."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for that."""
    keep_best: int = 0
    """Checkpoints with the lowest validation loss that are kept, of those written right after an evaluation."""


@dataclass
class TrackerConfig:
    names: list[str] = field(default_factory=lambda: ["wandb"])
    """Views of metrics.jsonl: wandb, tensorboard, trackio; several at once. metrics.jsonl itself is always written."""
    project: str = "tokenyard"
    """Project of W&B and trackio."""
    entity: str | None = None
    """W&B team or user; null is the account's default."""
    group: str | None = None
    """Group of W&B and trackio."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    job_type: str | None = None
    """W&B job type; null is WANDB_JOB_TYPE, else train."""


@dataclass
class LogConfig:
    every: int | None = None
    """Steps between lines of the console and of metrics.jsonl; null is 10 on a GPU and 1 on a CPU."""
    layers_every: int = 250
    """Steps between tables of the layers' experts on the console; 0 for none."""


@dataclass
class EngineConfig:
    kind: Engine = Engine.torch
    """Who runs backward, reduction and update; the numbers are the same."""
    zero: int = 0
    """deepspeed: the ZeRO stage. 0 shards nothing, 1 the optimizer's state, 2 gradients too."""
    extra: dict[str, Any] = field(default_factory=dict)
    """deepspeed: further settings of its JSON file, the rest of which is written from this configuration."""


@dataclass
class SampleConfig:
    prompt: str = "def "
    """What the sample at the end of a run continues; empty for no sample."""
    tokens: int = 64
    """Length of that sample."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability."""


@dataclass
class Config:
    steps: int = 1150
    """Optimizer steps of the whole run."""
    seed: int = 1
    """Decides the initial weights and the order of the data."""
    sequence_length: int = 128
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
