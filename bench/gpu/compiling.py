"""torch.compile on and off: the same numbers, and what a step takes."""

from dataclasses import replace
from time import monotonic

import torch

from ...parallel.apply import initialise
from ...parity.compare import assembled
from ...parity.observe import observe_model
from ...train.config.config import Precision
from ...train.derive import DTYPES
from .alone import MODEL, model_alone
from .choices import ChoiceLog, again, kept
from .machine import has
from .models import LIMITS, configured, furthest
from .steps import BATCHES, NARROW, build, fitting, measure
from .tell import Absent, Teller
from .waits import random_rows

STEPS, SHALLOW = 2, replace(MODEL, layers=1)
SECONDS = 25.0
"""That compiling the wide model may take."""


def run(teller: Teller) -> None:
    if teller.cuda and not has("triton"):
        raise Absent("triton is not installed, nor in .gpu/")
    for precision, limits in LIMITS.items():
        if teller.cuda or precision is Precision.fp32:
            same_numbers(teller, precision, limits)
    if not teller.cuda:
        teller.skip("bf16 and the compiled step", "a CPU compiles for minutes")
        return
    if teller.remaining < SECONDS:
        teller.skip("compiled step", f"{teller.remaining:.0f} s are left")
        return
    model = fitting(teller.device) if teller.scale == "full" else NARROW
    trained = build(model, teller.device, compiled=True)
    rows = random_rows(trained.parallel, *BATCHES[teller.scale][0])
    begin = monotonic()
    trained.step(rows)()
    teller.fact("seconds of the first compiled step", round(monotonic() - begin, 1))
    measure(teller, trained, rows, "compiled")


def same_numbers(teller: Teller, precision: Precision, limits: dict[str, float]) -> None:
    """Three steps with compiled blocks against three without, with the same choices of experts."""
    choices, found = ChoiceLog(), []
    for compiled in (False, True):
        with again(choices) if compiled else kept(choices):
            parallel = model_alone(SHALLOW, teller.device, DTYPES[precision], None, compiled=compiled)
            initialise(parallel, 1)
            seen = observe_model(parallel, configured(SHALLOW, precision), STEPS)
            found.append(assembled(one._replace(tensor=one.tensor.cpu()) for one in seen))
    torch.compiler.reset()
    for column, (value, key) in furthest(found[1], found[0]).items():
        where = f"step {key.step}, {key.kind} {key.name}".strip()
        teller.below(f"compiled, {precision.value}, {column}", value, limits[column], where)
