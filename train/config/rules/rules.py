"""The rules that must hold between settings, with candidates that may fix a violation. Types and names are checked by compose."""

import math
import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from ....data.config import STREAMED, Corpus, Packing, TokenizerKind
from ....moe.param_shapes import shapes
from ....parallel.config import PipelineSchedule
from ....parallel.layout import rank_shapes
from ....ranges import bounds, inside, outside
from .. import deepspeed_settings
from ..config import Config, Device, GradientDtype, OptimizerStates, Precision, ScheduleUnit, Shape
from ..matrices import OptimizerName
from ..schema import nearest_text, written
from ..state_bytes import block_of, states_of
from . import launch_rules, model_rules, parallel_rules
from .rule import Violation, divisors, multiples, valid_pairs

TRACKERS = ("wandb", "tensorboard", "trackio", "jsonl", "none")
OPTIONAL = ("tensorboard", "trackio")
"""Trackers whose packages are extras of tokenyard, with the same names."""

NO_SNAPSHOT = "needs a GPU, whose memory has snapshots, or profile.steps, whose table then counts bytes"
PROBE_TOKENS = 64
"""The longest questions of the probes take about as many bytes, each a token at worst."""
BYTE_PIECES = 259
"""256 bytes and 3 special tokens."""


def violations(config: Config, world: int) -> Iterator[Violation]:
    """Yields the violations. Take one at a time: later rules rely on earlier ones, and may raise if those do not hold."""
    for place, rule in enumerate(RULES):
        yield from (violation._replace(place=place) for violation in rule(config, world))


def layout_violations(config: Config, world: int) -> Iterator[Violation]:
    """Yields those of the rules that only `parallel` and `batch` can break, if `violations` has found none of another layout."""
    for rule in (*LAYOUT_RULES, batch):
        yield from rule(config, world)


def intervals(config: Config, world: int) -> Iterator[Violation]:
    for key, _, interval in outside(config):
        yield Violation(key, f"must be in {interval}", _around(key, interval))


def tokenizer(config: Config, world: int) -> Iterator[Violation]:
    rows, trained = config.model.vocabulary, config.tokenizer.path is None
    if config.tokenizer.kind is TokenizerKind.bytes and rows < BYTE_PIECES:
        rule = f"must be at least {BYTE_PIECES}, the pieces of tokenizer=bytes"
        yield Violation("model.vocabulary", rule, range(BYTE_PIECES, 2 * BYTE_PIECES))
    if config.tokenizer.kind is TokenizerKind.sentencepiece and trained and config.tokenizer.pieces > rows:
        yield Violation("tokenizer.pieces", f"must be at most model.vocabulary={rows}", [rows])


def data(config: Config, world: int) -> Iterator[Violation]:
    """Checks the time that a rank may wait for its source, while the others wait in a collective, against their timeout."""
    limit = config.parallel.timeout_seconds
    streams = config.data.corpus in (*STREAMED, Corpus.mix)
    if world > 1 and streams and config.data.patience_seconds + config.data.stall_seconds >= limit:
        rule = f"must, with data.stall_seconds, stay below parallel.timeout_seconds={limit:g}"
        yield Violation("data.patience_seconds", rule, [limit / 2])
    if streams and config.data.packing is Packing.best_fit:
        rule = f"must be concat with data.corpus={config.data.corpus.value}, tokenyard prepare makes shards that best_fit can pack"
        yield Violation("data.packing", rule, [Packing.concat])


def schedule(config: Config, world: int) -> Iterator[Violation]:
    schedule, batch = config.schedule, config.batch.schedule
    right = valid_pairs(batch, lambda tokens, size: 0 < tokens < math.inf and size >= 1 and size == int(size))
    if batch != right:
        yield Violation("batch.schedule", "must be pairs of a rising number of tokens > 0 and a number of sequences >= 1", [right])
        return
    end, unit = config.steps, f"steps={config.steps}"
    if schedule.unit is ScheduleUnit.tokens:
        end = config.batch.sizes(config.sequence_length).before(config.steps) * config.sequence_length
        unit = f"the {end} tokens of steps={config.steps}"
    wsd = schedule.shape is Shape.wsd
    if wsd and schedule.decay is not None and schedule.decay > end:
        yield Violation("schedule.decay", f"must be at most {unit}", [end])
    if schedule.decay_from is not None:
        if not wsd:
            yield Violation("schedule.decay_from", f"must be null with schedule.shape={schedule.shape.value}, wsd decays", [None])
        if schedule.decay is not None:
            rule = f"must be null with schedule.decay={schedule.decay}, both say where the decay begins"
            yield Violation("schedule.decay_from", rule, [None])
        if schedule.decay_from >= config.steps:
            yield Violation("schedule.decay_from", f"must be below steps={config.steps}", range(1, config.steps))


def states(config: Config, world: int) -> Iterator[Violation]:
    """Checks that ranks hold whole blocks of 8-bit moments, since a block has one scale and is cut on no layout; and what Muon,
    whose momentum is as wide as the weights and stays on the device, does not do, nor a run in fp64."""
    if config.precision is Precision.fp64 and config.optimizer.gradients is not GradientDtype.fp32:
        yield Violation("optimizer.gradients", "must be fp32, as the weights, with precision=fp64", [GradientDtype.fp32])
    if config.optimizer.name is OptimizerName.muon:
        for key, value in (("states", OptimizerStates.fp32), ("offload", False), ("gradients", GradientDtype.fp32)):
            if getattr(config.optimizer, key) != value:
                yield Violation(f"optimizer.{key}", f"must be {written(value)} with optimizer.name=muon", [value])
    if config.optimizer.states is not OptimizerStates.int8:
        return
    whole, held = shapes(config.model), rank_shapes(config.model, config.parallel, world)
    for name, shape in held.items():
        if states_of(OptimizerStates.int8, name, len(shape)) is OptimizerStates.int8 and shape[-1] % block_of(whole[name][-1]):
            rule = (
                f"a rank holds {shape[-1]} of {whole[name][-1]} columns of {name}, no whole blocks of {block_of(whole[name][-1])}"
            )
            yield Violation("optimizer.states", rule, [OptimizerStates.bf16])
            return


def trackers(config: Config, world: int) -> Iterator[Violation]:
    wrong = [name for name in config.tracker.names if name not in TRACKERS]
    if wrong:
        right = [nearest_text(str(name), TRACKERS) if name in wrong else name for name in config.tracker.names]
        yield Violation("tracker.names", f"may hold {', '.join(TRACKERS)}", [list(dict.fromkeys(right))])
    for name in (name for name in config.tracker.names if name in OPTIONAL and find_spec(name) is None):
        rest = [other for other in config.tracker.names if other != name]
        yield Violation("tracker.names", f"{name} is not installed here, `pip install tokenyard[{name}]` does", [rest])


def profile(config: Config, world: int) -> Iterator[Violation]:
    profile = config.profile
    try:
        profile.span(config.steps)
    except ValueError:
        numbers = sorted(min(max(int(number), 1), config.steps) for number in re.findall(r"\d+", profile.steps or "") or [1])
        near = f"{numbers[0]}-{numbers[-1]}" if numbers[0] < numbers[-1] else str(numbers[0])
        yield Violation("profile.steps", f"must be a step, or the first and the last, as 10-12, of steps={config.steps}", [near])
    if any(not 0 <= rank < world for rank in profile.ranks):
        near = list(dict.fromkeys(min(max(rank, 0), world - 1) for rank in profile.ranks))
        yield Violation("profile.ranks", f"must be ranks from 0 to {world - 1}", [near])
    if profile.memory and profile.steps is None and config.device is Device.cpu:
        yield Violation("profile.memory", NO_SNAPSHOT, [False])


def downstream(config: Config, world: int) -> Iterator[Violation]:
    """Checks what the probes and tasks of an evaluation need."""
    evaluate = config.evaluate
    if evaluate.probes and config.sequence_length < PROBE_TOKENS:
        rule = f"needs sequence_length of at least {PROBE_TOKENS}, in which its questions fit, and it is {config.sequence_length}"
        yield Violation("evaluate.probes", rule, [0])
    if evaluate.tasks and find_spec("lm_eval") is None:
        yield Violation("evaluate.tasks", "needs lm-eval, which is not installed here, `pip install tokenyard[lm-eval]` does", [[]])
    for name in evaluate.tasks:
        if name.endswith((".yaml", ".yml")) and not Path(name).expanduser().is_file():
            yield Violation(
                "evaluate.tasks", f"has {name}, and there is no such file", [[other for other in evaluate.tasks if other != name]]
            )
    for key in ("tasks_every", "tasks_limit"):
        if getattr(evaluate, key) is not None and not evaluate.tasks:
            yield Violation(f"evaluate.{key}", "needs evaluate.tasks, which has none", [None])
    if config.sample.every and not (config.sample.prompt or config.sample.prompts):
        yield Violation("sample.every", "needs sample.prompt or sample.prompts, and both are empty", [0])


def local_tier(config: Config, world: int) -> Iterator[Violation]:
    folder, run = config.checkpoint.local.folder, config.run.dir
    if (
        folder is not None
        and run is not None
        and Path(run).absolute() in (own := Path(folder).expanduser().absolute(), *own.parents)
    ):
        rule = f"must be each host's own, and run.dir={run} is for all of them"
        yield Violation("checkpoint.local.folder", rule, ["/dev/shm/tokenyard"])


def batch(config: Config, world: int) -> Iterator[Violation]:
    p, sequences = config.parallel, config.batch.sequences
    data = world // p.tensor // p.context // p.pipeline
    micro = config.batch.micro or 1
    together = data * (config.batch.micro or max(1, sequences // data))
    interleaved = p.pipeline if p.pipeline_schedule is PipelineSchedule["interleaved"] else 1
    if any(size % (together * interleaved) for size in config.batch.schedule[1::2]):
        unit = together * interleaved
        sizes = [float(max(unit, round(size / unit) * unit)) for size in config.batch.schedule[1::2]]
        near = [number for pair in zip(config.batch.schedule[::2], sizes, strict=True) for number in pair]
        rule = f"must have multiples of the {unit} sequences that all {data} data ranks take at a time"
        yield Violation("batch.schedule", rule, [near])
    if sequences % data:
        degrees = {"tensor": p.tensor, "context": p.context, "pipeline": p.pipeline}
        shown = [f"parallel.{name}={degree}" for name, degree in degrees.items() if degree > 1 or name == "tensor"]
        rule = f"must be a multiple of the {data} data ranks ({' / '.join([f'{world} ranks', *shown])})"
        yield Violation("batch.sequences", rule, multiples(data * micro, sequences))
    if sequences // data % micro:
        rule = f"must divide the {sequences // data} sequences of a rank (batch.sequences={sequences} over {data} data ranks)"
        yield Violation("batch.micro", rule, divisors(sequences // data))
    if (
        p.pipeline_schedule is PipelineSchedule["interleaved"]
        and sequences // data // (config.batch.micro or sequences) % p.pipeline
    ):
        rule = (
            f"must cut the {sequences // data} sequences of a rank into a multiple of parallel.pipeline={p.pipeline} micro-batches"
        )
        fitting = [size for size in divisors(sequences // data) if sequences // data // size % p.pipeline == 0]
        near = fitting if config.batch.micro else fitting[-1:]
        yield Violation("batch.micro", f"{rule} with parallel.pipeline_schedule=interleaved", near)


LAYOUT_RULES: list[Callable[[Config, int], Iterator[Violation]]] = [
    parallel_rules.degrees,
    parallel_rules.ranks,
    parallel_rules.context,
    parallel_rules.expert_tensor,
    parallel_rules.exchange,
    parallel_rules.pipeline,
    parallel_rules.recompute,
    parallel_rules.cuda_graph,
    parallel_rules.products,
]

RULES: list[Callable[[Config, int], Iterator[Violation]]] = [
    intervals,
    model_rules.model,
    model_rules.attention,
    model_rules.experts,
    model_rules.routers,
    tokenizer,
    data,
    schedule,
    trackers,
    profile,
    downstream,
    local_tier,
    *LAYOUT_RULES,
    batch,
    states,
    deepspeed_settings.engine,
    launch_rules.launchers,
]
"""All rules in the order in which they are checked; later ones rely on earlier ones."""


def _around(key: str, interval: str) -> list[object]:
    """Candidates inside the interval: included bounds, whole numbers from the lower one, and the default."""
    default = attrgetter(key)(Config())
    low, high = bounds(interval)
    if isinstance(default, float):
        return [value for value in (low, high, default) if inside(value, interval)]
    top = [] if math.isinf(high) else [value for value in (int(high), int(high) - 1) if inside(value, interval)]
    return [*range(int(low), int(low) + 64), *top, *([] if default is None else [default])]
