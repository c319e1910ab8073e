"""Experts and the movement of rows on sizes (moe/experts.py, moe/dispatch.py, parallel/dispatch/async_collectives.py).

T tokens, D width, L experts of this rank, K choices of a token, R rows, N ranks of a group, F hidden columns of this rank.
"""

from collections.abc import Callable

from ...moe.config import Products
from .autograd import Buffer, Value
from .layer_sizes import BlockShape
from .operator_sizes import INDEX, Sized


def experts(rank: Sized, shape: BlockShape, x: Value, rows: float, weights: Value | None, plan: list[Buffer], sent: bool) -> Value:
    """The experts' own autograd function: saves its input and the first product. `weights`: x are tokens, gathered inside."""
    moe, p, T, D = shape.config.moe, shape.parallel, shape.tokens, shape.config.width
    F, P, L = moe.hidden // p.expert_tensor, moe.activation.projections, moe.experts // p.expert
    up, down = rank.weight("experts.gate_up", L * P * F * D), rank.weight("experts.down", L * D * F)
    outputs: list[Buffer] = []

    def product(inputs: float, matrices: float, result: float) -> Buffer:
        """A grouped product, and what is made of its operands before, in moe/fp8.py."""
        operands = list[Buffer]()
        for elements in () if moe.products is Products.wide else (inputs, matrices):
            quotients = None if moe.products is Products.fp8_blockwise else rank.bytes(4 * elements)
            operands.append(rank.bytes(elements))
            del quotients
        return rank.new(result)

    def first() -> Buffer:
        given = rank.new(rows * D) if weights is not None else None
        inner = product(rows * D, L * P * F * D, rows * P * F)
        del given
        active = rank.new(rows * F)
        y = product(rows * F, L * D * F, rows * D)
        outputs.append(rank.new(T * D) if weights is not None else y)
        del active, y
        return inner

    inner = rank.keep(first)
    if sent and rank.repeats and not outputs:
        outputs.append(rank.new(rows * D))
    out = outputs.pop() if sent else rank.keep(outputs.pop)
    rank.saved()
    held = [x.buffer, inner, up.buffer, down.buffer, *plan, *([weights.buffer] if weights is not None else [])]

    def backward(grad: Buffer) -> list[Buffer | None]:
        gradient = rank.new(rows * D) if weights is not None else None
        active = product(rows * D, L * D * F, rows * F)
        grad_inner = rank.new(rows * P * F)
        if rank.defers:
            rank.deferred.append((gradient or grad, active, grad_inner, x.buffer, up.buffer, down.buffer, *plan))
            rank.deferred_elements[rank.of_experts] += [L * F * D, L * F * D * P]
        grad_down = None if rank.defers else rank.new(L * D * F)
        del gradient, active
        given = rank.new(rows * D) if weights is not None and not rank.defers else None
        grad_up = None if rank.defers else rank.new(L * P * F * D)
        del given
        grad_rows = product(rows * P * F, L * P * F * D, rows * D)
        if weights is not None:
            summed = rank.new(T * D)
            grad_rows = summed
        held.clear()
        del grad_inner
        grads: list[Buffer | None] = [grad_rows, grad_up, grad_down]
        return [*grads, rank.bytes(rank.wide * T * moe.top_k) if weights is not None else None]

    return rank.value(out, [x, up, down, weights], backward)


def permute(rank: Sized, shape: BlockShape, x: Value, rows: float, plan: list[Buffer]) -> Value:
    T, D, held = shape.tokens, shape.config.width, list(plan)

    def backward(_: Buffer) -> list[Buffer | None]:
        grad = rank.new(T * D)
        held.clear()
        return [grad]

    return rank.value(rank.new(rows * D), [x], backward)


def unpermute(rank: Sized, shape: BlockShape, y: Value, rows: float, weights: Value, plan: list[Buffer]) -> Value:
    """Saves the rows, whose products with the gradient are those of the weights."""
    T, D, held = shape.tokens, shape.config.width, [y.buffer, weights.buffer, *plan]

    def backward(_: Buffer) -> list[Buffer | None]:
        grads: list[Buffer | None] = [rank.new(rows * D), rank.bytes(rank.wide * rows)]
        held.clear()
        return grads

    out = rank.new(T * D)
    rank.saved()
    return rank.value(out, [y, weights], backward)


class Travel:
    """A collective in two halves: its input and output exist from the start until the wait, forward and backward."""

    def __init__(self, rank: Sized, sends: float, receives: float) -> None:
        self.rank, self.sends, self.receives = rank, sends, receives
        self.running: list[Buffer] = []

    def start(self, x: Value, ends_layer: bool = False) -> Value:
        """Starts to send `sends` elements of narrow rows. `ends_layer`: in a second pass the wait would."""
        if not self.rank.repeats or self.rank.tape is None:
            self.running = [x.buffer, self._labelled(0 if ends_layer and self.rank.repeats else self.receives)]

        def backward(gradient: Buffer) -> list[Buffer | None]:
            gradient.holds = None
            return [gradient]

        return self.rank.value(self.rank.bytes(0), [x], backward)

    def _labelled(self, elements: float) -> Buffer:
        return self.rank.labelled("exchange", lambda: self.rank.new(elements))

    def wait(self, link: Value, unpack: Callable[[Buffer], Buffer] = lambda came: came) -> Value:
        """Returns the rows that came, unpacked. The gradient starts back here."""

        def arrived() -> Buffer:
            out = self.running.pop() if self.running else self.rank.bytes(0)
            self.running.clear()
            return unpack(out)

        out = self.rank.keep(arrived)

        def backward(gradient: Buffer) -> list[Buffer | None]:
            running = self._labelled(self.sends)
            running.holds = gradient
            return [running]

        return self.rank.value(out, [link], backward)


def shared_rows(rank: Sized, shape: BlockShape, x: Value, rows: float) -> Value:
    """Expert tensor parallelism: the rows of all ranks of the group, with this rank's columns, and the sum of the parts."""
    N, D = shape.parallel.expert_tensor, shape.config.width
    travel = Travel(rank, rows * N * D, rows * N * D)
    copies = rank.unary(x, rows * D, rows * N * D)
    del x
    link = travel.start(copies)
    del copies
    order = [rank.bytes(INDEX * rows * N) for _ in range(2)]
    came = travel.wait(link)
    del link
    y = reordered(rank, came, rows * N, order)
    del came
    y = experts(rank, shape, y, rows * N, None, [], sent=True)
    y = reordered(rank, y, rows * N, order)
    back = Travel(rank, rows * N * D, rows * N * D)
    link = back.start(y)
    del y
    came = back.wait(link)
    return rank.unary(came, 0, rows * D)


def reordered(rank: Sized, x: Value, rows: float, order: list[Buffer], width: int | None = None) -> Value:
    D, held = width or rank.row, list(order)

    def backward(_: Buffer) -> list[Buffer | None]:
        grad = rank.new(rows * D)
        held.clear()
        return [grad]

    return rank.value(rank.new(rows * D), [x], backward)


def compute(rank: Sized, shape: BlockShape, rows: Value, count: float, sent: bool) -> Value:
    """The experts of this rank, or its columns of them."""
    if shape.parallel.expert_tensor > 1:
        return shared_rows(rank, shape, rows, count)
    return experts(rank, shape, rows, count, None, [], sent)
