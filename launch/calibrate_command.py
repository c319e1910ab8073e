"""`tokenyard plan calibrate=FILE`: what a report of `make gpu` says of the step time, for one plan or, written, for all."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..plan.calibrate import Calibration, calibrate
from ..plan.coefficients import COEFFICIENTS, coefficients, measured_on, write_coefficients
from ..train.config.config import ConfigError
from .words import split_words

WRITE = "coefficients"
"""What --write may be here."""


def calibrate_command(arguments: Namespace) -> None:
    """Prints the coefficients that the report replaces, and writes them. Raises ConfigError."""
    own, rest = split_words(arguments.words, ("calibrate",))
    if rest:
        key = rest[0].partition("=")[0]
        raise ConfigError(f"{key}: a plan needs a cluster too; nearest valid: cluster=h100x8 calibrate={own['calibrate']}")
    if arguments.explain or arguments.write not in (None, WRITE):
        key, value = ("--explain", arguments.explain) if arguments.explain else ("--write", arguments.write)
        raise ConfigError.of(key, value, "a calibration alone has no layout", f"--write {WRITE}")
    found = calibrate(Path(own["calibrate"]))
    before = coefficients(own=True), measured_on()
    if arguments.write:
        try:
            write_coefficients("tokenyard", {name: after for name, (_, after) in found.replaced.items()}, found.gpu.name)
        except OSError as error:
            raise ConfigError.of(
                "--write", WRITE, f"{COEFFICIENTS} cannot be written ({error.strerror})", "cluster=... calibrate=..."
            ) from error
    print(json.dumps(as_json(found)) if arguments.json else "\n".join(lines(found, *before, written=bool(arguments.write))))


def lines(found: Calibration, committed: Any, gpu: str, written: bool) -> list[str]:
    """Returns the coefficients as they were fitted on published steps, as plans have used them, and as they were measured."""
    title = (
        f"{found.path}, measured on {found.gpu.title}: {len(found.replaced)} coefficients of the step time (plan/coefficients.py)"
    )
    head = f"{'':16}{'published':>11}{f'in use ({gpu})':>17}{f'measured ({found.gpu.name})':>20}"
    rows = [
        f"{name:16}{fitted:>11.4g}{getattr(committed, name):>17.4g}{measured:>20.4g}"
        for name, (fitted, measured) in found.replaced.items()
    ]
    one = f"for one plan: tokenyard plan cluster={found.gpu.name}x8 calibrate={found.path} model=..."
    every = f"for all plans and what `tokenyard train` says of its layout: tokenyard plan calibrate={found.path} --write {WRITE}"
    last = [f"written to {COEFFICIENTS}: all plans and `tokenyard train` use them"] if written else [one, every]
    return [title, "", head, *rows, "", *last]


def as_json(found: Calibration) -> dict[str, Any]:
    replaced = {name: {"published": fitted, "measured": measured} for name, (fitted, measured) in found.replaced.items()}
    return {"file": str(found.path), "gpu": found.gpu.name, "coefficients": replaced}
