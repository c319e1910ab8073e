"""Draws the stages of a pipeline and its schedule as text. Does not import torch."""

from ...moe.config import ModelConfig
from ..config import ParallelConfig
from .schedule import BACKWARD, FORWARD, WEIGHTS, ZERO_BUBBLE, Action, Span, bubble, most_kept, schedule, stages_at, timeline
from .stages import cut_layers

COLUMNS = 104
"""Width of the schedule."""
BACKWARD_TIME = 2
"""The time of a backward pass, in forward passes. One half is for the gradients of weights."""
BRACKETS = {FORWARD: ("", ""), BACKWARD: "[]", WEIGHTS: "()"}
"""Around the micro-batch of an action."""


def pipeline_diagram(model: ModelConfig, parallel: ParallelConfig, micros: int) -> list[str]:
    """Returns the layers of each rank, how many micro-batches it keeps at most, and the schedule of `micros` micro-batches."""
    cut, ranks, stages, kind = cut_layers(model, parallel), parallel.pipeline, parallel.pipeline_stages, parallel.pipeline_schedule
    overlap = parallel.pipeline_overlap
    lists = [schedule(kind, ranks, rank, stages // ranks, micros, overlap) for rank in range(ranks)]
    deferred = BACKWARD_TIME / 2 if kind in ZERO_BUBBLE else 0
    spans = timeline(lists, stages, 1, BACKWARD_TIME - deferred, deferred)
    lines = [f"{'pipeline':10}{'layers':34}keeps at most"]
    for rank in range(ranks):
        held = ", ".join(_layers(cut, stage) for stage in stages_at(kind, ranks, stages, rank))
        kept = most_kept(lists[rank])
        lines.append(f"{rank:<10}{held:34}{kept} micro-batch{'es' * (kept != 1)}")
    lines += [
        "",
        f"schedule {kind.value}, {micros} micro-batches: ranks idle for {bubble(spans):.0%} of their work",
    ]
    if stages > ranks:
        lines.append("a forward pass is its micro-batch, a backward pass [it]; of the stages on a rank the first is a, then b, ...")
    if deferred:
        lines.append("a backward pass [it] leaves the gradients of weights, which are (it)")
    if overlap:
        lines.append(
            "a forward pass and the [backward] pass after it run side by side: one computes while rows of the other travel"
        )
    width = len(_cell(lists[0][-1]._replace(micro=micros - 1), ranks, stages)) + (3 if deferred else 1)
    return [*lines, *(f"{rank:<10}{_drawn(spans[rank], ranks, stages, width)}" for rank in range(ranks))]


def _layers(cut: list[range], stage: int) -> str:
    inside = cut[stage]
    parts = ["embedding"] * (stage == 0)
    parts += [str(inside[0]) if len(inside) == 1 else f"{inside[0]}-{inside[-1]}"] if len(inside) else []
    return " + ".join([*parts, *["head"] * (stage == len(cut) - 1)])


def _cell(action: Action, ranks: int, stages: int) -> str:
    chunk = chr(ord("a") + action.stage // ranks) if stages > ranks else ""
    return f"{chunk}{action.micro}"


def _drawn(spans: list[Span], ranks: int, stages: int, width: int) -> str:
    """Returns the line of a rank, a column of `width` for the time of a forward pass; what is too wide is left out."""
    text, slots = "", COLUMNS // width
    for action, begin, end in spans:
        if end > slots:
            return f"{text.ljust(int(begin) * width)} ..."
        cell = _cell(action, ranks, stages)
        size = int(end - begin) * width - 1
        left, right = BRACKETS[action.kind]
        text = text.ljust(int(begin) * width) + (f"{left}{cell}{right}".center(size) if left else cell.ljust(size)) + " "
    return text.rstrip()
