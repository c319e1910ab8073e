"""Profiles a step with torch's profiler: kernels by name, launches, gaps; and measures its memory."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from ...train.config.config import Config
from ...train.config.model_summary import rank_bytes
from .recorder import Recorder
from .steps import BATCHES, NARROW, ModelAndOptimizer, build, fitting
from .waits import random_rows

MOST_ROWS, LONGEST_NAME = 40, 100
STEPS = 2
GAP = 20e-6
"""Idle seconds that count as a gap; consecutive launches are closer."""


class Busy(NamedTuple):
    """The activity of a device, in seconds."""

    span: float
    """From the start of the first kernel to the end of the last."""
    busy: float
    """Time in which at least one kernel runs."""
    gaps: int
    """Gaps longer than GAP."""
    longest: float


def run(recorder: Recorder) -> None:
    model = fitting(recorder.device) if recorder.scale == "full" else NARROW
    trained = build(model, recorder.device)
    for sequences, length in BATCHES[recorder.scale]:
        rows = random_rows(trained.parallel, sequences, length)
        step = trained.step(rows)
        for _ in range(3):
            step()
        seen = profiled(step, recorder)
        report_kernels(recorder, list(seen.events() or []), f"{rows.ids.numel()} tokens")
        report_operators(recorder, seen, f"{rows.ids.numel()} tokens")
        if recorder.cuda:
            report_memory(recorder, trained, step, rows.ids.numel())
    if not recorder.cuda:
        recorder.skip("gaps and memory", "a CPU has neither kernels to launch nor a count of its memory")


def profiled(step: Any, recorder: Recorder) -> profile:
    """The profiler, after STEPS steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if recorder.cuda else [])]
    with profile(activities=activities, record_shapes=True) as seen:
        for _ in range(STEPS):
            step()
        if recorder.cuda:
            torch.cuda.synchronize()
    return seen


def report_kernels(recorder: Recorder, events: list[Any], title: str) -> None:
    """Reports the kernels of a GPU, or the operators of a CPU by self time."""
    # User annotations, as of the optimizer, are device events too.
    kernels = (
        [one for one in events if one.device_type == DeviceType.CUDA and not one.is_user_annotation] if recorder.cuda else events
    )
    sums: dict[str, tuple[float, int]] = {}
    for event in kernels:
        seconds, number = sums.get(event.name, (0.0, 0))
        own = event.time_range.elapsed_us() if recorder.cuda else event.self_cpu_time_total
        sums[event.name] = seconds + own / 1e6, number + 1
    total = sum(seconds for seconds, _ in sums.values())
    recorder.fact(f"{'kernels' if recorder.cuda else 'operators'} of a step, {title}", len(kernels) // STEPS)
    if recorder.cuda:
        found = busy((event.time_range.start / 1e6, event.time_range.end / 1e6) for event in kernels)
        share = found.busy / max(found.span, 1e-9)
        words = f"{1e3 * found.span / STEPS:.2f} ms a step, busy {share:.1%}, {found.gaps // STEPS} gaps of more than "
        recorder.fact(f"device, {title}", f"{words}{1e6 * GAP:.0f} us, the longest {1e3 * found.longest:.2f} ms")
    for name, (seconds, number) in sorted(sums.items(), key=lambda item: -item[1][0])[:MOST_ROWS]:
        cells = {"ms a step": round(1e3 * seconds / STEPS, 3), "of all": f"{seconds / max(total, 1e-12):.1%}"}
        recorder.row(f"time of a step by name, {title}", name=name[:LONGEST_NAME], **cells, launches=number / STEPS)


def report_operators(recorder: Recorder, seen: profile, title: str) -> None:
    """Reports the time of the kernels by the operator that launched them and the shapes of its inputs."""
    times = {one: one.self_device_time_total if recorder.cuda else one.self_cpu_time_total for one in seen.key_averages(True)}
    operators = [one for one in times if one.device_type == DeviceType.CPU and times[one] > 0]
    for one in sorted(operators, key=lambda one: -times[one])[:MOST_ROWS]:
        shapes = " ".join("x".join(map(str, shape)) for shape in one.input_shapes if shape)
        cells = {"ms a step": round(times[one] / 1e3 / STEPS, 3), "calls": one.count / STEPS, "inputs": shapes[:LONGEST_NAME]}
        recorder.row(f"time of a step by operator, {title}", operator=one.key, **cells)


def busy(intervals: Iterable[tuple[float, float]]) -> Busy:
    """The activity of a device, from the start and end of kernels, which may overlap."""
    ordered = sorted(intervals)
    if not ordered:
        return Busy(0.0, 0.0, 0, 0.0)
    (first, until), total, gaps = ordered[0], 0.0, list[float]()
    begin = first
    for start, end in ordered[1:]:
        if start > until:
            gaps.append(start - until)
            total += until - begin
            begin = start
        until = max(until, end)
    long = [gap for gap in gaps if gap > GAP]
    return Busy(until - first, total + until - begin, len(long), max(gaps, default=0.0))


def report_memory(recorder: Recorder, trained: ModelAndOptimizer, step: Any, tokens: int) -> None:
    """Compares the peak memory of a step with the estimate of `tokenyard params` for weights, gradients and moments."""
    torch.cuda.reset_peak_memory_stats(recorder.device)
    step()
    torch.cuda.synchronize(recorder.device)
    peak, after = torch.cuda.max_memory_allocated(recorder.device), torch.cuda.memory_allocated(recorder.device)
    states = rank_bytes(Config(model=trained.parallel.model.config), 1)["total"]
    cells = {"estimated states MiB": states >> 20, "held after a step MiB": after >> 20, "peak MiB": peak >> 20}
    rest = {"beyond the estimate MiB": (peak - states) >> 20, "of it bytes a token": (peak - states) // tokens}
    recorder.row("memory of a step", tokens=tokens, **cells, **rest)
    reserved = torch.cuda.memory_reserved(recorder.device)
    recorder.fact(f"reserved by the allocator, {tokens} tokens", f"{reserved >> 20} MiB")
    near = abs(after - states) <= 0.05 * states + 2**28
    recorder.check(f"states take what is estimated, {tokens} tokens", near, f"{after >> 20} MiB held, {states >> 20} MiB estimated")
