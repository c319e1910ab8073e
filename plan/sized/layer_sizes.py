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
    x = rank.gather(x, T * D, ranks, shape.copies)
    U = T * ranks
    active = hidden_columns(rank, x, name, U, D, hidden, P)
    del x
    y = rank.linear(active, f"{name}.down", U, hidden, D, D)
    del active
    return rank.scatter(y, T * D, ranks, shape.copies)


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
