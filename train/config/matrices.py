"""Which parameters Muon updates, and into which matrices it cuts them. Does not import torch.

The other parameters, which AdamW updates, are embedding, head, norms, biases, sinks, convolutions, vectors, and by default routers.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ...moe.config import AttentionKind, ModelConfig
from ...ranges import within


class OptimizerName(Enum):
    adamw = "adamw"
    muon = "muon"


@dataclass
class MuonConfig:
    """Muon (Jordan et al. 2024) for matrices, with updates as large as AdamW's (Liu et al. 2025), for optimizer.name=muon."""

    momentum: float = field(default=0.95, metadata=within("[0, 1)"))
    """Decay of the momentum, in Nesterov's form; beta1 is that of parameters that AdamW updates."""
    router: bool = False
    """Routers are updated by Muon too, not by AdamW."""
    fused: bool = False
    """Gate and up, keys and values of a latent, and the latent and its rotary key are one matrix each; false: apart."""


ADAMW = ("embedding.weight", "head.weight", "_conv.", "_bias")
"""What the name of a parameter with several dimensions contains if AdamW updates it."""
STEPS = 5
"""Iterations of Newton-Schulz."""

Index = tuple[int, ...]


class Run(NamedTuple):
    """`rows` rows of a parameter from `start` on, at one place of the dimensions before its last two; of a matrix from `at` on."""

    leading: Index
    start: int
    rows: int
    at: int


class Matrix(NamedTuple):
    """A matrix that is orthogonalised by itself: runs of rows of a parameter, with all of their columns."""

    shape: tuple[int, int]
    runs: tuple[Run, ...]


def by_muon(name: str, shape: tuple[int, ...], muon: MuonConfig) -> bool:
    """Whether Muon updates the parameter of this name and global shape, if it updates any."""
    matrix = len(shape) >= 2 and min(shape[-2:]) > 1 and not any(part in name for part in ADAMW)
    return matrix and (muon.router or ".router." not in name)


def one_moment(name: str, shape: tuple[int, ...], muon: MuonConfig | None) -> bool:
    """Whether the optimizer keeps a momentum of this parameter and no second moment. `muon`: None for AdamW."""
    return muon is not None and by_muon(name, shape, muon)


def matrices(
    name: str, shape: tuple[int, ...], model: ModelConfig, muon: MuonConfig, first: int = 0, end: int | None = None
) -> Iterator[Matrix]:
    """Yields the matrices of a parameter in order; of a parameter of experts those of the experts from `first` to before `end`.

    Heads of multi-head latent attention are matrices of their own. Fused projections (gate and up; keys and values of a latent; the
    latent and its rotary key) are one matrix each with `muon.fused`, else apart.
    """
    *leading, rows, columns = shape
    if ".experts." in name:
        indices = itertools.product(range(first, shape[0] if end is None else end), *map(range, leading[1:]))
    else:
        indices = itertools.product(*map(range, leading))
    if muon.fused and name.endswith("gate_up"):
        parts = leading[-1]
        for _, group in itertools.groupby(indices, lambda index: index[:-1]):
            runs = tuple(Run(index, 0, rows, place * rows) for place, index in enumerate(group))
            yield Matrix((parts * rows, columns), runs)
        return
    widths = itertools.cycle(row_widths(name, rows, model, muon))
    cuts = list[tuple[int, int]]()
    start = 0
    while start < rows:
        cuts.append((start, next(widths)))
        start += cuts[-1][1]
    for index in indices:
        for start, width in cuts:
            yield Matrix((width, columns), (Run(index, start, width, 0),))


def row_widths(name: str, rows: int, model: ModelConfig, muon: MuonConfig) -> tuple[int, ...]:
    """Returns the rows of the matrices of a parameter, which repeat until all of its rows are taken."""
    mla, last = model.attention.mla, name.rpartition(".attention.")[2]
    if model.attention.kind is not AttentionKind.mla or _is_linear(name, model):
        return (rows,)
    match last:
        case "q.weight" | "q_up.weight":
            return (mla.nope_width + mla.rope_width,)
        case "kv_up.weight":
            return (mla.nope_width + mla.value_width,) if muon.fused else (mla.nope_width, mla.value_width)
        case "kv_down.weight":
            return (rows,) if muon.fused else (mla.kv_rank, mla.rope_width)
        case _:
            return (rows,)


def newton_schulz_flops(shape: tuple[int, int]) -> int:
    """Returns the FLOPs that orthogonalise one matrix: in each step X X^T, its square, and a product with X."""
    short, long = sorted(shape)
    return STEPS * (4 * short * short * long + 2 * short**3)


def _is_linear(name: str, model: ModelConfig) -> bool:
    first, _, rest = name.partition(".")
    return first == "layers" and model.linear_layer(int(rest.partition(".")[0]))
