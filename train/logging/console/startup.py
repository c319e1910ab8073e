"""The table at the start of a run: model, batch, data, layout and device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ....moe.param_count import Count, flops_per_token, moe_layers
from ....parallel.config import Recompute
from ....version import __version__
from ...config.config import Config
from ...config.model_summary import layout_text
from ...config.number_format import flops, short
from ...tokenizer_source import ROWS, rows_for
from .text import Line, rows, title


@dataclass
class StartupFacts:
    """What the table shows in addition to the configuration."""

    run_dir: str
    resume: str
    """Where the run starts from and why, such as: new run (checkpoint.resume=auto found no checkpoint)."""
    device: str
    """The name of the device, such as: cpu (2 cores), NVIDIA H200."""
    ranks: int
    threads: int
    """CPU threads of each rank."""
    documents: int | None
    """Training documents; None if they are streamed."""
    tokens: int | None
    """Training tokens; None if they are streamed."""
    pieces: int
    """Those of the tokenizer."""
    bytes_per_token: float
    peak_flops: float
    """FLOP/s of all devices together."""
    peak_source: str
    precision_from: str
    """The source of the precision, such as: the default on a GPU."""
    first_step: int = 0
    """Steps that earlier starts have done."""


def startup_lines(config: Config, count: Count, facts: StartupFacts, planned: Sequence[str] = ()) -> list[Line]:
    """Returns the table. `planned`: what the layout should need and take, in lines."""
    streamed = facts.documents is None or facts.tokens is None
    amount = "streamed" if streamed else f"{facts.documents:,} documents, {short(facts.tokens or 0)} tokens"
    table = [
        *_model(config, count),
        *_work(config, facts),
        ("data", f"{config.data.corpus.value}: {amount}"),
        ("tokenizer", _tokenizer(config, facts)),
        *_machine(config, facts),
        *(("plan" if place == 0 else "", line) for place, line in enumerate(planned)),
        ("run folder", facts.run_dir),
        ("start", facts.resume),
    ]
    return [title(f"tokenyard {__version__}"), *rows(table), []]


def _tokenizer(config: Config, facts: StartupFacts) -> str:
    rows = config.model.vocabulary
    rounded = f" (rounded up to a multiple of {ROWS})" if rows == rows_for(facts.pieces) != facts.pieces else ""
    pieces = f"{facts.pieces:,} pieces in {rows:,} rows of the embedding{rounded}"
    return f"{config.tokenizer.kind.value}, {pieces}, {facts.bytes_per_token:.2f} bytes a token"


def _model(config: Config, count: Count) -> list[tuple[str, str]]:
    model, moe = config.model, config.model.moe
    layers = moe_layers(model)
    experts = f"; {moe.experts} experts, top-{moe.top_k}, in {layers} of them" if layers else "; dense"
    parts = {name: value for name, value in vars(count).items() if value and name != "active_experts"}
    forward = flops_per_token(model, config.sequence_length)
    return [
        ("model", f"{model.layers} layers, {model.width} wide, {model.heads} heads{experts}"),
        ("parameters", f"{short(count.total)} total, {short(count.active)} active per token"),
        ("", ", ".join(f"{name} {short(value)}" for name, value in parts.items())),
        ("compute", f"{flops(forward)} per token forward, {flops(3 * forward)} with backward"),
    ]


def _work(config: Config, facts: StartupFacts) -> list[tuple[str, str]]:
    """Returns the batch and the length of the run."""
    sizes, length = config.batch.sizes(config.sequence_length), config.sequence_length
    overall = sizes.before(config.steps) * length
    of_step = f"{config.batch.sequences} sequences x {length} = {config.batch.sequences * length:,} tokens a step"
    later = [f"{phase.sequences} from step {phase.step + 1:,}" for phase in sizes.phases[1:] if phase.step < config.steps]
    left = f", {config.steps - facts.first_step:,} to go" if facts.first_step else ""
    seen = f", {overall / facts.tokens:.2f} passes over the data" if facts.tokens else ""
    return [
        ("batch", ", ".join([of_step, *later])),
        ("length", f"{config.steps:,} steps{left}; {short(overall)} tokens{seen}"),
    ]


def _machine(config: Config, facts: StartupFacts) -> list[tuple[str, str]]:
    """Layout, device and precision."""
    parallel = config.parallel
    compiled = ", compiled" if config.compile else ""
    recompute = f", activations recomputed ({parallel.recompute.value})" if parallel.recompute.repeats else ""
    recompute = ", activations in host memory" if parallel.recompute is Recompute.offload else recompute
    peak = f"; peak {flops(facts.peak_flops)}/s, {facts.peak_source}" if math.isfinite(facts.peak_flops) else ""
    return [
        ("layout", layout_text(parallel, facts.ranks)),
        ("device", f"{facts.device}, {facts.threads} thread{'s' * (facts.threads != 1)} a rank{peak}"),
        ("precision", f"{config.precision.value}, {facts.precision_from}{compiled}{recompute}"),
    ]
