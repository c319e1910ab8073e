"""The exchanges of experts on sizes (parallel/dispatch/).

T tokens of this rank, K choices of each, D width, N ranks of an exchange. Loads are even, as in a dry run, but for `hot`.
"""

from collections.abc import Callable

from ...parallel.config import Exchange
from ...parallel.layout import room
from .autograd import Buffer, Value
from .expert_sizes import Travel, compute, permute, reordered, unpermute
from .layer_sizes import BlockShape, hidden_columns, multiply
from .operator_sizes import INDEX, Sized


def room_of(shape: BlockShape) -> int:
    """Returns the rows that the symmetric exchange has room for on a rank."""
    moe, parallel = shape.config.moe, shape.parallel
    return room(shape.tokens, moe.top_k, moe.experts, parallel.expert, parallel.exchange_rows)


def memory_of_exchange(shape: BlockShape, narrow: int) -> int:
    """Returns the bytes that the symmetric exchange keeps for all layers: two halves, each for the rows of one transfer."""
    if shape.parallel.exchange is not Exchange.symmetric or shape.parallel.expert == 1:
        return 0
    return 2 * narrow * shape.config.width * max(room_of(shape), shape.tokens * shape.config.moe.top_k)


def exchanged(rank: Sized, shape: BlockShape, x: Value, weights: Value, plan: list[Buffer]) -> tuple[Value, Value | None]:
    """Returns the outputs of the experts for this rank's tokens, and of the shared expert."""
    match shape.parallel.exchange:
        case Exchange.symmetric:
            return _symmetric(rank, shape, x, weights, plan)
        case Exchange.gather:
            return _gather(rank, shape, x, weights)
        case Exchange.plain:
            return _plain(rank, shape, x, weights, plan)
        case _:
            return _deduplicated(rank, shape, x, weights)


def _plain(rank: Sized, shape: BlockShape, x: Value, weights: Value, plan: list[Buffer]) -> tuple[Value, Value | None]:
    """A row for each choice, sorted by expert, to its rank and back; the weights stay here."""
    D, R = shape.config.width, shape.tokens * shape.config.moe.top_k
    A = R * shape.hot
    there = Travel(rank, R * D, A * D)
    link = there.start(permute(rank, shape, x, R, plan))
    finish_shared = start_shared_expert(rank, shape, x)
    order = [rank.bytes(INDEX * A) for _ in range(2)]
    came = there.wait(link)
    del link, x
    rows = reordered(rank, came, A, order)
    del came
    computed = compute(rank, shape, rows, A, sent=True)
    del rows
    back = Travel(rank, A * D, R * D)
    ordered = reordered(rank, computed, A, order)
    link = back.start(ordered)
    del computed, ordered
    shared = finish_shared()
    came = back.wait(link)
    del link
    return unpermute(rank, shape, came, R, weights, plan), shared


def start_shared_expert(rank: Sized, shape: BlockShape, x: Value) -> Callable[[], Value | None]:
    """The first product of the shared expert and its activation. Returns a function for the rest, which returns the output."""
    moe, c, before = shape.config.moe, shape.config, rank.meter.label
    if not moe.shared_hidden:
        return lambda: None
    rank.meter.label = "shared expert"
    hidden = [hidden_columns(rank, x, "shared", shape.tokens, c.width, moe.shared_hidden, c.activation.projections)]
    rank.meter.label = before

    def finish() -> Value:
        rank.meter.label = "shared expert"
        y = rank.linear(hidden.pop(), "shared.down", shape.tokens, moe.shared_hidden, c.width, c.width)
        if moe.shared_gate:
            gate = rank.linear(x, "shared_gate", shape.tokens, c.width, 1)
            y = multiply(rank, gate, y, shape.tokens * c.width)
            del gate
        rank.meter.label = before
        return y

    return finish


def _symmetric(rank: Sized, shape: BlockShape, x: Value, weights: Value, plan: list[Buffer]) -> tuple[Value, Value | None]:
    T, D, rows, places = shape.tokens, shape.config.width, shape.tokens * shape.config.moe.top_k, room_of(shape)
    targets = [rank.bytes(2 * INDEX * (rows + places))]
    held = list(targets)

    def to_experts(_: Buffer) -> list[Buffer | None]:
        moved = rank.new(rows * D)
        held.clear()
        grad = rank.new(T * D)
        del moved
        return [grad]

    came = rank.value(rank.keep(lambda: rank.new(places * D)), [x], to_experts)
    shared = start_shared_expert(rank, shape, x)()
    computed = compute(rank, shape, came, places, sent=False)
    del came
    back = rank.value(rank.keep(lambda: rank.new(rows * D)), [computed], lambda _: [rank.new(places * D)])
    del computed, x
    return unpermute(rank, shape, back, rows, weights, [*plan, *targets]), shared


def expand(rank: Sized, x: Value, rows: float, copies: float, deepest: float) -> Value:
    """Copies rows; the gradient of a row is the sum of those of its copies."""
    D = rank.row
    index = [rank.bytes(INDEX * (copies + 2 * rows))]

    def backward(_: Buffer) -> list[Buffer | None]:
        result = _summed(rank, rows * D, deepest * D)
        index.clear()
        return [result]

    return rank.value(rank.new(copies * D), [x], backward)


def reduce(rank: Sized, y: Value, rows: float, copies: float, deepest: float, weights: Value | None = None) -> Value:
    """Sums the copies of each row, times their weights."""
    D = rank.row
    index = [rank.bytes(INDEX * (2 * copies + rows))]
    held = [y.buffer] if weights is not None else []

    def backward(_: Buffer) -> list[Buffer | None]:
        gradient = rank.new(copies * D)
        index.clear()
        if weights is None:
            return [gradient, None]
        wide = [rank.bytes(rank.wide * copies * D) for _ in range(2)]
        wide.clear()
        wide.append(rank.bytes(rank.wide * copies * D))
        result = rank.new(copies * D)
        held.clear()
        return [result, rank.bytes(rank.wide * copies)]

    total = _summed(rank, rows * D, deepest * D)
    if weights is not None:
        rank.saved()
    return rank.value(total, [y, weights], backward)


def _summed(rank: Sized, rows: float, deepest: float) -> Buffer:
    total = rank.bytes(rank.wide * rows)
    added = [rank.new(deepest), rank.bytes(rank.wide * deepest)]
    added.clear()
    narrow, result = rank.new(rows), rank.new(rows)
    del total, narrow
    return result


def _copies(rows: float, choices: float, ranks: int, top_k: int) -> float:
    """Returns the rows that leave for all ranks (`assumed_depths` of parallel/dispatch/expand.py)."""
    of_rank = choices / ranks
    return ranks * max(rows * (1 - (1 - 1 / ranks) ** (choices / rows)), of_rank / top_k)


def _deduplicated(rank: Sized, shape: BlockShape, x: Value, weights: Value) -> tuple[Value, Value | None]:
    p, moe, T, D = shape.parallel, shape.config.moe, shape.tokens, shape.config.width
    inside = min(shape.node, p.expert)
    axes = [p.expert // inside, inside] if p.exchange is Exchange.hierarchical and inside not in (1, p.expert) else [p.expert]
    rows, choices, hops = float(T), float(T * moe.top_k), list[tuple[float, float]]()
    experts, finish_shared = moe.experts, None
    for ranks in axes:
        experts //= ranks
        copies = _copies(rows, choices, ranks, min(moe.top_k, experts))
        hops.append((rows, copies))
        travel = Travel(rank, copies * D, copies * D)
        link = travel.start(expand(rank, x, rows, copies, min(rows, copies)))
        if len(hops) == 1:
            finish_shared = start_shared_expert(rank, shape, x)
        x = travel.wait(link)
        del link
        rows = copies
    count = choices * shape.hot
    came = expand(rank, x, rows, count, rows)
    del x
    computed = compute(rank, shape, came, count, sent=False)
    del came
    y = reduce(rank, computed, rows, count, rows, weights)
    del computed
    shared = None
    for before, copies in reversed(hops):
        travel = Travel(rank, copies * D, copies * D)
        link = travel.start(y, ends_layer=before == T)
        if before == T:
            shared = finish_shared() if finish_shared is not None else None
        came = travel.wait(link)
        del link
        y = reduce(rank, came, before, copies, min(before, copies))
        del came
    return y, shared


def _gather(rank: Sized, shape: BlockShape, x: Value, weights: Value) -> tuple[Value, Value | None]:
    moe, N, T, D = shape.config.moe, shape.parallel.expert, shape.tokens, shape.config.width
    count, tokens = T * moe.top_k * shape.hot, T * N
    travel = Travel(rank, T * D, tokens * D)
    link = travel.start(rank.unary(x, T * D, T * D))
    finish_shared = start_shared_expert(rank, shape, x)
    packed = rank.bytes(rank.wide * 2 * tokens * moe.top_k)
    numbers = rank.bytes(2 * INDEX * tokens * moe.top_k)
    arrived = travel.wait(link)
    del link, x, numbers
    deepest = _copies(tokens, count, 1, moe.top_k) if N == 1 else tokens * (1 - (1 - 1 / N) ** moe.top_k)
    came = expand(rank, arrived, tokens, count, deepest)
    del arrived
    computed = compute(rank, shape, came, count, sent=False)
    del came
    y = reduce(rank, computed, tokens, count, deepest, weights)
    del computed, packed
    back = Travel(rank, tokens * D, tokens * D)
    link = back.start(y, ends_layer=True)
    del y
    shared = finish_shared()

    def summed(parts: Buffer) -> Buffer:
        wide = rank.bytes(rank.wide * T * D)
        result = rank.new(T * D)
        del wide, parts
        return result

    return back.wait(link, summed), shared
