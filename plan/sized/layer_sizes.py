"""The shape of a block on a rank, and the layers that attention and experts share, on sizes.

T tokens of this rank between the blocks, U those that its attention and dense feed-forward see (gathered over tensor ranks).
"""

from dataclasses import dataclass

from ...moe.config import ModelConfig
from ...parallel.config import ParallelConfig
from .autograd import Buffer, Value
from .operator_sizes import Sized


@dataclass(frozen=True)
class BlockShape:
    """What determines the memory of a block on a rank."""

    config: ModelConfig
    parallel: ParallelConfig
    sequences: int
    length: int
    hot: float
    """Rows of this rank's experts over those of an even load."""
    node: int
    """Ranks of a node."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.seen // self.parallel.tensor

    @property
    def seen(self) -> int:
        """U."""
        return self.sequences * self.length // self.parallel.context

    @property
    def copies(self) -> bool:
        """Whether gathered sequences are put in order by a copy: one sequence is in order."""
        return self.sequences > 1


def feedforward(rank: Sized, shape: BlockShape, x: Value, name: str, hidden: int, ranks: int) -> Value:
    """The dense feed-forward, over gathered tokens."""
    D, T, P = shape.config.width, shape.tokens, shape.config.activation.projections
    x = gather(rank, x, T * D, ranks, shape.copies)
    U = T * ranks
    active = hidden_columns(rank, x, name, U, D, hidden, P)
    del x
    y = rank.linear(active, f"{name}.down", U, hidden, D, D)
    del active
    return scatter(rank, y, T * D, ranks, shape.copies)


def hidden_columns(rank: Sized, x: Value, name: str, rows: int, width: int, hidden: int, projections: int) -> Value:
    """What the last product of a feed-forward takes."""
    inner = rank.linear(x, f"{name}.gate_up", rows, width, projections * hidden, width)
    return rank.unary(inner, rows * projections * hidden, rows * hidden, "x")


def multiply(rank: Sized, x: Value, y: Value, elements: float) -> Value:
    held = [x.buffer, y.buffer]
    rank.saved()

    def backward(_: Buffer) -> list[Buffer | None]:
        grads: list[Buffer | None] = [rank.new(elements), rank.new(elements)]
        held.clear()
        return grads

    return rank.value(rank.new(elements), [x, y], backward)


def gather(rank: Sized, x: Value, own: float, ranks: int, copies: bool = True) -> Value:
    """All-gather of sequences; the gradient is reduce-scattered. `copies`: parts of several sequences are put in order."""
    if ranks == 1:
        return x

    def forward() -> Buffer:
        return rank.labelled("exchange", lambda: rank.new(own * ranks))

    out = rank.keep(forward)
    out = rank.new(own * ranks) if copies else out
    return rank.value(out, [x], lambda _: [_scattered(rank, own, ranks, copies)])


def scatter(rank: Sized, x: Value, own: float, ranks: int, copies: bool = True) -> Value:
    """Reduce-scatter of sequences; the gradient is gathered."""
    if ranks == 1:
        return x
    out = rank.keep(lambda: _scattered(rank, own, ranks, copies))

    def backward(_: Buffer) -> list[Buffer | None]:
        gathered = rank.labelled("exchange", lambda: rank.new(own * ranks))
        return [rank.new(own * ranks) if copies else gathered]

    return rank.value(out, [x], backward)


def _scattered(rank: Sized, own: float, ranks: int, copies: bool) -> Buffer:
    parts = rank.labelled("exchange", lambda: rank.new(own * ranks)) if copies else None
    result = rank.new(own)
    del parts
    return result
