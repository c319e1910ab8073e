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


class MuonProducts(Enum):
    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"


@dataclass
class MuonConfig:
    """Muon (Jordan et al. 2024) for matrices, with updates as large as AdamW's (Liu et al. 2025), for optimizer.name=muon."""

    momentum: float = field(default=0.95, metadata=within("[0, 1)"))
    """Decay of the momentum, in Nesterov's form; beta1 is that of parameters that AdamW updates."""
    router: bool = False
    """Routers are updated by Muon too, not by AdamW."""
    fused: bool = False
    """Gate and up, keys and values of a latent, and the latent and its rotary key are one matrix each; false: apart."""
    products: MuonProducts = MuonProducts.auto
    """Products that orthogonalise are in bf16 or fp32; auto: bf16 on GPUs, fp32 on CPUs. With precision=fp64 all are in fp64."""


ADAMW = ("embedding.weight", "head.weight", "_conv.", "_bias")
"""What the name of a parameter with several dimensions contains if AdamW updates it."""
SEGMENTS = 2, 2, 1
"""Iterations of Newton-Schulz that are taken on X X^T before X is multiplied: five. More than two at a time fail in bf16."""
STEPS = sum(SEGMENTS)

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


def segments(shape: tuple[int, int]) -> tuple[int, ...]:
    """Returns how many iterations are taken at a time on X X^T: several, if that takes fewer FLOPs, as it does above 3 : 2."""
    return min(SEGMENTS, (1,) * STEPS, key=lambda each: _flops(shape, each))


def newton_schulz_flops(shape: tuple[int, int]) -> int:
    """Returns the FLOPs that orthogonalise one matrix."""
    return _flops(shape, segments(shape))


def _flops(shape: tuple[int, int], taken: tuple[int, ...]) -> int:
    """X X^T and a product with X for each segment; a square for each step, and three products more for all but its first."""
    short, long = sorted(shape)
    return sum(4 * short * short * long + 2 * short**3 * (4 * steps - 3) for steps in taken)


def _is_linear(name: str, model: ModelConfig) -> bool:
    first, _, rest = name.partition(".")
    return first == "layers" and model.linear_layer(int(rest.partition(".")[0]))
