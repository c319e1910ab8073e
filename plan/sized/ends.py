"""What is before and after the blocks on sizes, and a block as FSDP and recomputation run it.

The end: the last norm, the head with its loss, and multi-token prediction.
"""

from collections import deque

from ...moe.config import ModelConfig
from ...parallel.config import Recompute
from .autograd import Buffer, Node, Value, run_backward
from .block import block
from .layer_sizes import BlockShape, gather
from .operator_sizes import INDEX, WIDE, Around, Casts, Gathered, Sized

LOGITS = 2**27
"""Logits that exist at once on a GPU: parallel/vocabulary.py, which needs torch."""


def run_block(rank: Sized, shape: BlockShape, index: int, x: Value, around: Around | None) -> Value:
    """A block with its gathers and reductions, recomputed if the layout says so."""
    gathers = around is not None

    def ended(gradient: Buffer) -> list[Buffer | None]:
        if around is not None:
            rank.release_block()
            rank.flat.clear()
            rank.reduce_gradients(around.own.dense, rank.gradients)
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
    rank.records, rank.tape, rank.saves, rank.named_casts = False, tape, 0, []
    y = block(rank, shape, index, Value(x.buffer))
    rank.records, rank.tape = True, None
    held, saves, casts = [x.buffer], rank.saves, rank.named_casts

    def backward(gradient: Buffer) -> list[Buffer | None]:
        arrived, gradients = list[Buffer](), [gradient]
        del gradient

        def arrive(result: Buffer) -> list[Buffer | None]:
            arrived.append(result)
            return []

        def again(x: Buffer, allocates: bool) -> list[Node]:
            rank.tape, rank.repeats, rank.saves, rank.allocates = tape, True, saves, allocates
            rank.nodes = [Node(rank.meter, [], arrive)]
            block(rank, shape, index, Value(x, rank.nodes[0]))
            rank.tape, rank.repeats, rank.allocates = None, False, True
            nodes, rank.nodes = rank.nodes, []
            return nodes

        # What comes after the last operator that saves runs backward before the second pass.
        nodes = again(rank.bytes(0), allocates=False)
        waiting = run_backward([nodes[-1]], gradients, nodes[rank.last_saver].order)
        places = [nodes.index(node) for node in waiting]
        nodes = again(held.pop(), allocates=True)
        roots = [nodes[place] for place in places]
        del nodes
        gradients += [node.gradient for node in waiting if node.gradient is not None]
        waiting.clear()
        run_backward(roots, gradients)
        casts.clear()
        return [arrived.pop()]

    return rank.value(y.buffer, [x], backward)


def embedding_of(config: ModelConfig) -> str:
    """Returns the name of the weight of the embedding."""
    return "head" if config.tie_embeddings else "embedding"


def embed(rank: Sized, shape: BlockShape, added: bool = False) -> Value:
    """The embeddings of the ids, in the dtype of the activations. The gradient of the weight is as large as the weight.

    `added`: there is a gradient that it is added to.
    """
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
        if not added:
            rank.keep_root(embedding_of(c), gradient)
        return []

    looked_up = rank.bytes(each * elements * t)
    absent = rank.bytes(each * elements * t) if t > 1 else None
    del looked_up, absent
    return rank.value(rank.new(elements), [], backward)


def end(rank: Sized, shape: BlockShape, x: Value, before: Gathered, arounds: list[Around | None]) -> list[Value]:
    """The losses of the head and of each module of multi-token prediction. `before`: what FSDP gathered of the last layer."""
    rank.behind_block(before)
    c, elements = shape.config, shape.tokens * shape.config.width
    rank.meter.label = "head"
    losses = [_head(rank, shape, rank.norm(x, elements, shape.tokens))]
    for depth, around in zip(range(c.mtp_depth), arounds, strict=True):
        rank.meter.label = "prediction"
        embedded = embed(rank, shape)
        rank.meter.label = "prediction"
        joined = _joined(rank, rank.norm(embedded, elements, shape.tokens), rank.norm(x, elements, shape.tokens), elements)
        del embedded
        y = rank.linear(joined, "projection", shape.tokens, 2 * c.width, c.width)
        del joined
        x = run_block(rank, shape, c.layers + depth, y, around)
        del y
        rank.meter.label = "head"
        losses.append(_head(rank, shape, rank.norm(x, elements, shape.tokens)))
    return losses


def _joined(rank: Sized, x: Value, y: Value, elements: float) -> Value:
    return rank.value(rank.new(2 * elements), [x, y], lambda gradient: [gradient, gradient])


def _bytes_of_logit(rank: Sized, config: ModelConfig, chunks: bool) -> tuple[int, int]:
    """Returns the bytes of a logit while the gradient of the weight is computed, and the most at another time.

    `chunks`: there are several. Then the logits of one exist until the next has overwritten the names.
    """
    n, w, capped, scaled = rank.narrow, rank.wide, config.output_softcap is not None, config.output_multiplier != 1.0
    if not capped and not scaled and n <= WIDE:
        return n, 2 * n if chunks else n
    kept = 2 * n + w
    forward = (kept if chunks else 0) + n * (1 + scaled + 2 * capped)
    return kept, max(forward, n + 3 * w if capped and scaled else 2 * n + 2 * w)


def _head(rank: Sized, shape: BlockShape, x: Value) -> Value:
    """Head and loss, which compute their gradients in the forward pass, a chunk of tokens at a time."""
    c, t = shape.config, shape.parallel.tensor
    x = gather(rank, x, shape.tokens * c.width, t, shape.copies)
    columns, elements = c.vocabulary // t, shape.seen * c.width
    weight, gathered = columns * c.width, rank.casts is Casts.gathered
    cast = rank.new(weight) if not gathered and rank.narrow != rank.stored else None
    grad_x = rank.new(elements)
    grad_weight = rank.labelled("gradients", lambda: rank.bytes(rank.wide * weight))
    rows = min(shape.seen, max(1, LOGITS // columns))
    each, most = _bytes_of_logit(rank, c, rows < shape.seen)
    logits = rank.bytes(rows * columns * each)
    product = rank.new(weight) if rank.narrow != rank.wide else None
    del product
    passing = rank.bytes(rows * columns * (most - each))
    del cast, logits, passing
    kept = [grad_x, grad_weight]
    del grad_x, grad_weight

    def backward(_: Buffer) -> list[Buffer | None]:
        gradient = kept.pop()
        if gathered and rank.narrow != rank.wide:
            gradient = rank.labelled("gradients", lambda: rank.new(weight))
        rank.keep_root("head", gradient)
        return [kept.pop()]

    return rank.value(rank.bytes(rank.wide), [x], backward)
