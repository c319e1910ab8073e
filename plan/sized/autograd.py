"""Autograd on sizes: which memory a forward and a backward pass hold, by arithmetic alone. Without torch.

A `Buffer` is memory of a known size that is free as soon as nobody refers to it, as a tensor's. A `Value` is what an operator
gives: its memory, and the node of the graph that made it. A node keeps what the operator saves, until its backward pass has run;
nodes run in the reverse order of their making. So a model written in these operators has the same memory at the same times as the
real one, a thousand times faster than with tensors without numbers.
"""

import heapq
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


class MemoryMeter:
    """Counts the bytes that are held now, the most since `begin`, and what they were, by label."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.label = ""
        self.held: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.made = 0

    def begin(self) -> None:
        """Forgets the peak."""
        self.peak, self.at_peak = self.now, self.held.copy()


class Buffer:
    """Memory of `size` bytes, which counts until it is garbage."""

    __slots__ = ("holds", "label", "meter", "size")

    def __init__(self, meter: MemoryMeter, size: int) -> None:
        self.meter, self.size, self.label = meter, size, meter.label
        self.holds: Buffer | None = None
        """What must live as long as this."""
        meter.now += size
        meter.held[self.label] += size
        if meter.now > meter.peak:
            meter.begin()

    def relabel(self, label: str) -> None:
        self.meter.held[self.label] -= self.size
        self.label = label
        self.meter.held[label] += self.size

    def __del__(self) -> None:
        self.meter.now -= self.size
        self.meter.held[self.label] -= self.size


Gradients = Sequence["Buffer | None"]
Backward = Callable[[Buffer], Gradients]
"""Takes the gradient of a node's output, returns those of its inputs."""


class Node:
    """An operator in the graph: `inputs` are the nodes that gave its differentiable inputs, `backward` may hold saved memory."""

    __slots__ = ("backward", "gradient", "inputs", "order")

    def __init__(self, meter: MemoryMeter, inputs: Sequence["Node | None"], backward: Backward) -> None:
        self.inputs, self.backward = inputs, backward
        self.gradient: Buffer | None = None
        meter.made += 1
        self.order = meter.made


class Value:
    """The output of an operator. Views of it are the same value."""

    __slots__ = ("buffer", "node")

    def __init__(self, buffer: Buffer, node: Node | None = None) -> None:
        self.buffer, self.node = buffer, node


ALONE = 2
"""References to a gradient, of a node and of the one who counts, if nobody else refers to it."""


def run_backward(roots: list[Node], gradients: list[Buffer], behind: int = -1) -> list[Node]:
    """Runs the backward pass from `roots`, and takes the gradients of their outputs out of the list. Frees what the nodes keep.

    Only nodes with a larger order than `behind` run; returns those that have a gradient and did not run.
    """
    waiting = list[tuple[int, Node]]()
    while roots:
        root = roots.pop()
        root.gradient = gradients.pop()
        heapq.heappush(waiting, (-root.order, root))
        del root
    while waiting and -waiting[0][0] > behind:
        node = heapq.heappop(waiting)[1]
        taken, node.gradient = [node.gradient] if node.gradient is not None else [], None
        results = list(node.backward(taken.pop()))
        sources, node.inputs, node.backward = node.inputs, (), _spent
        results.reverse()
        for source in sources:
            result = results.pop()
            if source is None or result is None:
                continue
            if source.gradient is None:
                source.gradient = result
                heapq.heappush(waiting, (-source.order, source))
            elif sys.getrefcount(source.gradient) > ALONE:
                source.gradient = Buffer(result.meter, result.size)
            del result  # else the sum of gradients is made in place
        del node
    return [node for _, node in waiting]


def _spent(_: Any) -> Gradients:
    raise AssertionError("a graph runs backward once")
