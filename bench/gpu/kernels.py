"""Where the time of a step goes: its kernels by name, launches and gaps, as torch's profiler sees them; and its memory."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]
from torch.profiler import ProfilerActivity, profile

from ...train.config.config import Precision
from ...train.config.model_summary import training_bytes
from .recorder import Recorder
from .steps import BATCHES, NARROW, Trained, build, fitting
from .waits import random_rows

MOST_ROWS, LONGEST_NAME = 40, 100
STEPS = 2
GAP = 20e-6
"""Seconds without a kernel that count as a gap: launches that follow each other are closer."""


class Busy(NamedTuple):
    """Of a device over some time, in seconds."""

    span: float
    """From the first kernel's begin to the last one's end."""
    busy: float
    """In which at least one runs."""
    gaps: int
    """Longer than GAP."""
    longest: float


def run(recorder: Recorder) -> None:
    model = fitting(recorder.device) if recorder.scale == "full" else NARROW
    trained = build(model, recorder.device)
    for sequences, length in BATCHES[recorder.scale]:
        rows = random_rows(trained.parallel, sequences, length)
        step = trained.step(rows)
        for _ in range(3):
            step()
        tell_kernels(recorder, profiled(step, recorder), f"{rows.ids.numel()} tokens")
        if recorder.cuda:
            tell_memory(recorder, trained, step, rows.ids.numel())
    if not recorder.cuda:
        recorder.skip("gaps and memory", "a CPU has neither kernels to launch nor a count of its memory")


def profiled(step: Any, recorder: Recorder) -> list[Any]:
    """The profiler's events of STEPS steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if recorder.cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(STEPS):
            step()
        if recorder.cuda:
            torch.cuda.synchronize()
    return list(seen.events() or [])


def tell_kernels(recorder: Recorder, events: list[Any], title: str) -> None:
    """Of a GPU its kernels; of a CPU its operators, by the time that they spend themselves."""
    # Ranges that somebody named, as the optimizer does, are on the device's line too.
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


def busy(intervals: Iterable[tuple[float, float]]) -> Busy:
    """Of kernels that may overlap, each from its begin to its end."""
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


def tell_memory(recorder: Recorder, trained: Trained, step: Any, tokens: int) -> None:
    """The peak of a step beside what `tokenyard params` says that weights, gradients and moments take."""
    torch.cuda.reset_peak_memory_stats(recorder.device)
    step()
    torch.cuda.synchronize(recorder.device)
    peak, after = torch.cuda.max_memory_allocated(recorder.device), torch.cuda.memory_allocated(recorder.device)
    parameters = sum(parameter.numel() for parameter in trained.parallel.model.parameters())
    states = training_bytes(parameters, Precision.bf16)["total"]
    cells = {"estimated states MiB": states >> 20, "held after a step MiB": after >> 20, "peak MiB": peak >> 20}
    rest = {"beyond the estimate MiB": (peak - states) >> 20, "of it bytes a token": (peak - states) // tokens}
    recorder.row("memory of a step", tokens=tokens, **cells, **rest)
    reserved = torch.cuda.memory_reserved(recorder.device)
    recorder.fact(f"reserved by the allocator, {tokens} tokens", f"{reserved >> 20} MiB")
    near = abs(after - states) <= 0.05 * states + 2**28
    recorder.check(f"states take what is estimated, {tokens} tokens", near, f"{after >> 20} MiB held, {states >> 20} MiB estimated")
