"""What is before and after the blocks on sizes, and a block as FSDP and recomputation run it.

The end: the last norm, the head with its loss, and multi-token prediction.
"""

from collections import deque

from ...parallel.config import Recompute
from .autograd import Buffer, Node, Value, run_backward
from .block import block
from .layer_sizes import FUSED_NORMS, BlockShape
from .operator_sizes import INDEX, Around, Casts, Sized

LOGITS = 2**27
"""Logits that exist at once on a GPU: parallel/vocabulary.py, which needs torch."""


def run_block(rank: Sized, shape: BlockShape, index: int, x: Value, around: Around | None) -> Value:
    """A block with its gathers and reductions, recomputed if the layout says so."""
    gathers = around is not None

    def ended(gradient: Buffer) -> list[Buffer | None]:
        if around is not None:
            rank.release_block()
            rank.reduce_gradients(around.own.dense)
        return [gradient]

    def begins(gradient: Buffer) -> list[Buffer | None]:
        if around is not None:
            rank.gather_block(around.own, around.before, backward=True)
            if shape.parallel.recompute is Recompute.none:
                rank.gather_experts()
                rank.flat.clear()
        return [gradient]

    if around is not None:
        rank.gather_block(around.own, around.after)
    x = rank.value(x.buffer, [x], ended) if gathers else x
    y = block(rank, shape, index, x) if shape.parallel.recompute is Recompute.none else _recomputed(rank, shape, index, x)
    if gathers:
        rank.release_block()
        y = rank.value(y.buffer, [y], begins)
    return y


def _recomputed(rank: Sized, shape: BlockShape, index: int, x: Value) -> Value:
    """Keeps the input, and results on a tape if recomputation is selective."""
    tape = deque[Buffer]() if shape.parallel.recompute is Recompute.selective else None
    rank.records, rank.tape = False, tape
    y = block(rank, shape, index, Value(x.buffer))
    rank.records, rank.tape = True, None
    held = [x.buffer]

    def backward(gradient: Buffer) -> list[Buffer | None]:
        arrived = list[Buffer]()

        def arrive(result: Buffer) -> list[Buffer | None]:
            arrived.append(result)
            return []

        given = Value(held.pop(), Node(rank.meter, [], arrive))
        rank.tape, rank.repeats = tape, True
        again = block(rank, shape, index, given)
        rank.tape, rank.repeats = None, False
        assert again.node is not None
        nodes = [again.node]
        del again, given
        run_backward(nodes, [gradient])
        return [arrived.pop()]

    return rank.value(y.buffer, [x], backward)


def embed(rank: Sized, shape: BlockShape) -> Value:
    """The embeddings of the ids, in the dtype of the activations. The gradient of the weight is as large as the weight."""
    c, t, elements = shape.config, shape.parallel.tensor, shape.tokens * shape.config.width
    rank.meter.label = "embedding"
    each = rank.narrow if rank.casts is Casts.gathered else rank.stored
    vocabulary = c.vocabulary // t * c.width
    ids = rank.bytes(INDEX * shape.seen)
    held = [ids]

    def backward(_: Buffer) -> list[Buffer | None]:
        wide = rank.bytes(each * elements * t) if t > 1 or each != rank.narrow else None
        gradient = rank.labelled("gradients", lambda: rank.bytes(each * vocabulary))
        held.clear()
        del wide
        if rank.first or rank.casts is Casts.gathered:
            rank.root_gradients.setdefault("head" if c.tie_embeddings else "embedding", gradient)
        return []

    looked_up = rank.bytes(each * elements * t)
    absent = rank.bytes(each * elements * t) if t > 1 else None
    del looked_up, absent
    return rank.value(rank.new(elements), [], backward)


def end(rank: Sized, shape: BlockShape, x: Value, arounds: list[Around | None]) -> list[Value]:
    """The losses of the head and of each module of multi-token prediction."""
    c, elements = shape.config, shape.tokens * shape.config.width
    rank.meter.label = "head"
    losses = [_head(rank, shape, rank.norm(x, elements, FUSED_NORMS))]
    for depth, around in zip(range(c.mtp_depth), arounds, strict=True):
        rank.meter.label = "prediction"
        embedded = embed(rank, shape)
        rank.meter.label = "prediction"
        joined = _joined(rank, rank.norm(embedded, elements, FUSED_NORMS), rank.norm(x, elements, FUSED_NORMS), elements)
        del embedded
        y = rank.linear(joined, "projection", shape.tokens, 2 * c.width, c.width)
        del joined
        x = run_block(rank, shape, c.layers + depth, y, around)
        del y
        rank.meter.label = "head"
        losses.append(_head(rank, shape, rank.norm(x, elements, FUSED_NORMS)))
    return losses


def _joined(rank: Sized, x: Value, y: Value, elements: float) -> Value:
    return rank.value(rank.new(2 * elements), [x, y], lambda gradient: [gradient, gradient])


def _head(rank: Sized, shape: BlockShape, x: Value) -> Value:
    """Head and loss, which compute their gradients in the forward pass, a chunk of tokens at a time."""
    c, t = shape.config, shape.parallel.tensor
    x = rank.gather(x, shape.tokens * c.width, t, shape.copies)
    columns, elements = c.vocabulary // t, shape.seen * c.width
    weight, gathered = columns * c.width, rank.casts is Casts.gathered
    cast = rank.new(weight) if not gathered and rank.narrow != rank.stored else None
    grad_x = rank.new(elements)
    grad_weight = rank.labelled("gradients", lambda: rank.bytes(rank.wide * weight))
    rows = min(shape.seen, max(1, LOGITS // columns))
    narrow = c.output_softcap is None and c.output_multiplier == 1.0 and rank.narrow <= 4
    logits = rank.bytes(rows * columns * (rank.narrow if narrow else 2 * (rank.narrow + rank.wide)))
    product = rank.new(weight) if rank.narrow != rank.wide else None
    del cast, logits, product
    kept = [grad_x, grad_weight]
    del grad_x, grad_weight

    def backward(_: Buffer) -> list[Buffer | None]:
        gradient = kept.pop()
        if gathered and rank.narrow != rank.wide:
            gradient = rank.labelled("gradients", lambda: rank.new(weight))
        if rank.first or gathered:
            rank.root_gradients.setdefault("head", gradient)
        return [kept.pop()]

    return rank.value(rank.bytes(rank.wide), [x], backward)
