"""torch.compile on and off: compares the numbers and measures a compiled step."""

from dataclasses import replace
from time import monotonic

import torch

from ...parallel.apply import initialise
from ...parity.compare import assemble
from ...parity.observe import observe_model
from ...train.config.config import Precision
from ...train.derive import DTYPES
from .choices import ChoiceLog, record_choices, replay_choices
from .exchanges import MODEL, build_single_rank
from .machine import has
from .presets import LIMITS, configured, furthest
from .recorder import Recorder, Unavailable
from .steps import BATCHES, NARROW, build, fitting, measure
from .waits import random_rows

STEPS, SHALLOW = 2, replace(MODEL, layers=1)
SECONDS = 25.0
"""Time to reserve for compiling the wide model."""


def run(recorder: Recorder) -> None:
    if recorder.cuda and not has("triton"):
        raise Unavailable("triton is not installed, nor in .gpu/")
    for precision, limits in LIMITS.items():
        if recorder.cuda or precision is Precision.fp32:
            same_numbers(recorder, precision, limits)
    if not recorder.cuda:
        recorder.skip("bf16 and the compiled step", "a CPU compiles for minutes")
        return
    if recorder.remaining < SECONDS:
        recorder.skip("compiled step", f"{recorder.remaining:.0f} s are left")
        return
    model = fitting(recorder.device) if recorder.scale == "full" else NARROW
    trained = build(model, recorder.device, compiled=True)
    for sequences, length in BATCHES[recorder.scale]:
        rows = random_rows(trained.parallel, sequences, length)
        begin = monotonic()
        trained.step(rows)()
        recorder.fact(f"seconds of the first compiled step, {rows.ids.numel()} tokens", round(monotonic() - begin, 1))
        measure(recorder, trained, rows, "compiled")


def same_numbers(recorder: Recorder, precision: Precision, limits: dict[str, float]) -> None:
    """Compares training with compiled blocks to training without, with the same choices of experts."""
    choices, found = ChoiceLog(), []
    for compiled in (False, True):
        with replay_choices(choices) if compiled else record_choices(choices):
            parallel = build_single_rank(SHALLOW, recorder.device, DTYPES[precision], None, compiled=compiled)
            initialise(parallel, 1)
            seen = observe_model(parallel, configured(SHALLOW, precision), STEPS)
            found.append(assemble(one._replace(tensor=one.tensor.cpu()) for one in seen))
    torch.compiler.reset()
    for column, (value, key) in furthest(found[1], found[0]).items():
        where = f"step {key.step}, {key.kind} {key.name}".strip()
        recorder.below(f"compiled, {precision.value}, {column}", value, limits[column], where)
