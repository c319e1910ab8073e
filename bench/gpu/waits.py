"""Compares the host synchronisations of a step that torch's sync debug mode reports with those that the code names.

Every wait of a step goes through `host_read` of moe/device.py, with the name that it has in docs/performance.md.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ...moe import device as device_module
from ...moe.config import ModelConfig
from ...parallel.apply import Parallel, initialise
from ...parallel.config import OWN_EXCHANGES, Exchange
from ...train.batch import Rows
from ...train.config.config import OptimizerConfig
from ...train.optimizer import build_optimizer
from ...train.step import StepInput, train_step
from ..host_reads import ROOT, host_reads
from .exchanges import MODEL, build_single_rank, world_of_one
from .presets import preset, tiny_presets
from .recorder import Recorder, Unavailable

HEADING = "## Where the host waits"
COLUMNS = ["with", "place", "a step", "a pass"]
READER = "moe/device.py:"


class Listed(NamedTuple):
    """A row of the table: waits at a place, per step and per forward pass of each MoE layer."""

    place: str
    step: int
    layers: int


class Waits(NamedTuple):
    named: Counter[str]
    """Calls of `host_read`, by the name of the wait."""
    seen: Counter[str]
    """Waits that torch reports, by file and line."""
    places: frozenset[str] = frozenset()
    """The places that called `host_read`, by file and line."""

    @property
    def hidden(self) -> dict[str, int]:
        """Waits that do not go through `host_read`."""
        return {place: count for place, count in self.seen.items() if not place.startswith(READER) and place not in self.places}


def run(recorder: Recorder) -> None:
    listed = listed_waits()
    if listed is None:
        recorder.skip("table of waits", f"docs/performance.md has no table under '{HEADING}': waits are counted alone")
    models = [(f"{name}, one device", preset(name), None) for name in _names(recorder)]
    with world_of_one(recorder.device):
        for name, model, exchange in [*models, *((f"{one.value} exchange", MODEL, one) for one in OWN_EXCHANGES)]:
            report_waits(recorder, name, waits_of(model, recorder.device, exchange), model, listed)


def _names(recorder: Recorder) -> list[str]:
    try:
        names = tiny_presets()
        preset(names[0])
    except Unavailable as reason:
        recorder.skip("waits of the tiny models", str(reason))
        return []
    return names


def report_waits(recorder: Recorder, name: str, waits: Waits, model: ModelConfig, listed: list[Listed] | None) -> None:
    layers = sum(model.moe_layer(index) for index in range(model.layers)) + model.mtp_depth
    places = ", ".join(f"{count} x {place}" for place, count in waits.named.items())
    recorder.row("waits of a step", of=name, **{"MoE layers": layers}, waits=waits.named.total(), places=places)
    recorder.check(f"{name}: no hidden wait", not waits.hidden, f"{waits.hidden or 'none'}")
    through = waits.seen.total() - sum(waits.hidden.values())
    text = f"{waits.named.total()} reads, and torch reports {through} waits in them"
    recorder.check(f"{name}: no read waits twice", through <= waits.named.total(), text)
    if listed is None:
        return
    for place, count in waits.named.items():
        said = {row.step + row.layers * layers for row in listed if row.place == place}
        recorder.check(f"{name}: {place}", count in said, f"{count}, and the table says {sorted(said) or 'nothing'}")


def waits_of(model: ModelConfig, device: torch.device, exchange: Exchange | None) -> Waits:
    """The waits of the third step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a CPU that multiplies bf16 reads numbers of rows
    parallel = build_single_rank(model, device, dtype, exchange)
    initialise(parallel, 1)
    parallel.model.train()
    rows = random_rows(parallel, sequences=4, length=32)
    step = partial(train_step, parallel, build_optimizer(OptimizerConfig(), parallel), StepInput([rows], 1e-4, 1.0))
    step()
    step()
    with named_reads() as (named, places):
        seen = host_reads(step, device)
    return Waits(named, seen, frozenset(places))


def random_rows(parallel: Parallel, sequences: int, length: int) -> Rows:
    """Random rows in which every target is valid; the host has their number."""
    model = parallel.model.config
    ids = torch.randint(model.vocabulary, (sequences, length + 1), device=parallel.device)
    valid = [sequences * (length - depth) for depth in range(model.mtp_depth + 1)]
    return Rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), valid=valid)


@contextmanager
def named_reads() -> Iterator[tuple[Counter[str], set[str]]]:
    """Yields the calls of `host_read` by name, and their places. Replaces it in all modules that import it."""
    found, places = Counter[str](), set[str]()
    real = device_module.host_read

    def counted(x: Tensor, place: str, assumed: Callable[[], Any]) -> Any:
        found[place] += 1
        caller = sys._getframe(1)
        places.add(f"{Path(caller.f_code.co_filename).resolve().relative_to(ROOT).as_posix()}:{caller.f_lineno}")
        return real(x, place, assumed)

    with ExitStack() as stack:
        for module in [one for one in list(sys.modules.values()) if getattr(one, "host_read", None) is real]:
            stack.enter_context(patch.object(module, "host_read", counted))
        yield found, places


def listed_waits() -> list[Listed] | None:
    """The table in docs/performance.md; None if it is missing."""
    _, _, rest = (ROOT / "docs" / "performance.md").read_text().partition(f"{HEADING}\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rest.partition("\n## ")[0].splitlines() if line[:1] == "|"]
    if not rows or rows[0] != COLUMNS:
        return None
    return [Listed(place, int(step), int(layers)) for _, place, step, layers in rows[2:]]
