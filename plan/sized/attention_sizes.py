"""Attention on sizes: grouped-query and latent, with context parallelism (moe/attention.py, parallel/context.py).

T tokens of this rank between the blocks, U those that its attention sees.
"""

from ...moe.config import QKNorm
from ...moe.param_shapes import head_width
from ...parallel.config import ContextExchange
from .autograd import Buffer, Value
from .layer_sizes import BlockShape, gather, multiply, scatter
from .operator_sizes import Sized


def grouped(rank: Sized, shape: BlockShape, index: int, x: Value) -> Value:
    """Grouped-query attention."""
    c, t, U, D = shape.config, shape.parallel.tensor, shape.seen, shape.config.width
    h = head_width(c)
    H, G = c.heads // t * h, c.kv_heads // t * h
    x = gather(rank, x, shape.tokens * D, t, shape.copies)

    def project(x: Value, name: str, width: int, rotated: bool, normed: QKNorm = QKNorm.none) -> Value:
        y = rank.linear(x, name, U, D, width, D)
        if normed is QKNorm.head:
            y = rank.norm(y, U * width, U * width // h)
        if normed is QKNorm.full:
            y = wide_norm(rank, y, U * width)
        if c.attention.clip_qkv is not None and name != "gate":
            y = rank.unary(y, U * width, U * width, "x")
        return rank.unary(y, U * width, U * width) if rotated else y

    normed = c.attention.qk_norm
    q, k, v = project(x, "q", H, True, normed), project(x, "k", G, True, normed), project(x, "v", G, False)
    flexible = c.attention.sinks or c.attention.softcap is not None or c.windowed_layer(index)
    y = attention(rank, shape, [q, k, v], [H, G, G], H, c.heads // t, flexible)
    del q, k, v
    if c.attention.sinks:
        y = _sunk(rank, y, U * H)
    if c.attention.output_gate:
        gate = rank.unary(project(x, "gate", H, False), U * H, U * H, "y")
        y = multiply(rank, y, gate, U * H)
        del gate
    del x
    y = rank.linear(y, "o", U, H, D, D)
    return scatter(rank, y, shape.tokens * D, t, shape.copies)


def wide_norm(rank: Sized, x: Value, elements: float) -> Value:
    """RMSNorm from single operators: saves two wide copies of its input (HeadsNorm of moe/linear.py)."""
    rank.saved()
    wide = x.buffer if rank.narrow == rank.wide else rank.bytes(rank.wide * elements)
    square = rank.bytes(rank.wide * elements)
    del square
    normed = rank.bytes(rank.wide * elements)
    out = rank.bytes(rank.wide * elements)
    out = out if rank.narrow == rank.wide else rank.new(elements)
    kept = [wide, normed]

    def composite_backward(gradient: Buffer) -> list[Buffer | None]:
        first = gradient if rank.narrow == rank.wide else rank.bytes(rank.wide * elements)
        second, temporary = rank.bytes(rank.wide * elements), rank.bytes(rank.wide * elements)
        del first, temporary
        third, fourth = rank.bytes(rank.wide * elements), rank.bytes(rank.wide * elements)
        kept.clear()
        del second, fourth
        return [third if rank.narrow == rank.wide else rank.new(elements)]

    return rank.value(out, [x], composite_backward)


def _sunk(rank: Sized, y: Value, elements: float) -> Value:
    """Outputs times what sinks leave, in fp32, and cast."""
    held = [y.buffer]

    def backward(_: Buffer) -> list[Buffer | None]:
        wide = rank.bytes(rank.wide * elements)
        held.clear()
        product = rank.bytes(rank.wide * elements)
        del wide, product
        return [rank.new(elements)]

    wide = rank.bytes(rank.wide * elements)
    out = rank.new(elements)
    del wide
    return rank.value(out, [y], backward)


def latent(rank: Sized, shape: BlockShape, index: int, x: Value) -> Value:
    """Multi-head latent attention. Latents are projected from a rank's own tokens and then gathered."""
    c, mla, t, U, T, D = (
        shape.config,
        shape.config.attention.mla,
        shape.parallel.tensor,
        shape.seen,
        shape.tokens,
        shape.config.width,
    )
    H, query, L, r = c.heads // t, mla.nope_width + mla.rope_width, mla.kv_rank, mla.rope_width
    if mla.q_rank is None:
        q = rank.linear(gather(rank, x, T * D, t, shape.copies), "q", U, D, H * query, D)
    else:
        low = gather(rank, rank.linear(x, "q_down", T, D, mla.q_rank, D), T * mla.q_rank, t, shape.copies)
        low = rank.norm(low, U * mla.q_rank, U)
        low = rank.unary(low, U * mla.q_rank, U * mla.q_rank) if mla.scale_latents else low
        q = rank.linear(low, "q_up", U, mla.q_rank, H * query, D)
        del low
    both = gather(rank, rank.linear(x, "kv_down", T, D, L + r, D), T * (L + r), t, shape.copies)
    del x
    small = rank.norm(both, U * L, U)
    small = rank.unary(small, U * L, U * L) if mla.scale_latents else small
    key = rank.unary(both, U * r, U * r)
    seen = U
    if shape.parallel.context > 1 and shape.parallel.context_exchange is ContextExchange.gather:
        small, seen = _gathered(rank, shape, [small, key], U * (L + r)), U * shape.parallel.context
        key = small
    rotated = rank.unary(q, U * H * r, U * H * r)
    joined = joined_heads(rank, q, rotated, U * H * query, U * H * r)
    del q, rotated
    both_widths = H * (mla.nope_width + mla.value_width)
    kv = rank.linear(small, "kv_up", seen, L, both_widths, D)
    del small
    values = list[Buffer]()
    k = joined_heads(rank, kv, key, seen * H * query, 0, seen * both_widths, values)

    def of_values(gradient: Buffer) -> list[Buffer | None]:
        values.append(gradient)
        return [None]

    kv = rank.value(kv.buffer, [kv], of_values)
    del key, both
    widths = [H * query, H * query, H * mla.value_width]
    y = attention(rank, shape, [joined, k, kv], widths, H * mla.value_width, H, c.windowed_layer(index), seen)
    del joined, k, kv
    y = rank.linear(y, "o", U, H * mla.value_width, D, D)
    return scatter(rank, y, T * D, t, shape.copies)


def joined_heads(
    rank: Sized, x: Value, part: Value, elements: float, rotated: float, whole: float = 0, others: list[Buffer] | None = None
) -> Value:
    """Concatenates parts of heads; the gradients of the parts are views, which the split of x puts together.

    `whole`: elements of x if not all of them are here; `others` has the gradient of the rest.
    """

    def backward(gradient: Buffer) -> list[Buffer | None]:
        of_x = rank.new(whole or elements)
        if others is not None:
            others.clear()
        return [of_x, rank.new(rotated) if rotated else gradient]

    return rank.value(rank.new(elements), [x, part], backward)


def attention(
    rank: Sized, shape: BlockShape, given: list[Value], widths: list[int], out: int, heads: int, flexible: bool, seen: int = 0
) -> Value:
    """A fused kernel: saves queries, keys, values, output and a number for each query and head. `widths`: of all heads, a token."""
    U, context = shape.seen, shape.parallel.context
    seen = seen or U
    if context > 1 and shape.parallel.context_exchange is ContextExchange.heads:
        return _by_heads(rank, shape, given, widths, out, heads, flexible)
    if context > 1 and seen == U:
        both = _gathered(rank, shape, given[1:], U * (widths[1] + widths[2]))
        given, seen = [given[0], both, both], U * context
    parts = 2 if context > 1 else 1
    sizes = [U * widths[0] / parts, seen * widths[1], seen * widths[2]]
    outputs = [_fused(rank, given, sizes, U * out / parts, U * heads / parts, flexible) for _ in range(parts)]
    del given
    if parts == 1:
        return outputs[0]
    first, second = outputs
    outputs.clear()
    y = rank.value(rank.new(U * out), [first, second], lambda _: [rank.new(U * out / 2), rank.new(U * out / 2)])
    del first, second
    return rank.unary(y, U * out, U * out)


def _fused(rank: Sized, given: list[Value], sizes: list[float], out: float, queries: float, flexible: bool) -> Value:
    def make(elements: float, each: int) -> Buffer:
        return rank.bytes(each * elements) if flexible else rank.keep(lambda: rank.bytes(each * elements))

    y, logsumexp = make(out, rank.narrow), make(queries, rank.wide)
    held = [y, logsumexp, *(x.buffer for x in given)]

    def backward(_: Buffer) -> list[Buffer | None]:
        grads: list[Buffer | None] = [rank.new(size) for size in sizes]
        held.clear()
        return grads

    return rank.value(y, given, backward)


def _gathered(rank: Sized, shape: BlockShape, given: list[Value], own: float) -> Value:
    """Keys and values of all tokens, in the order of the tokens."""
    context = shape.parallel.context
    packed = rank.value(rank.new(own), given, lambda gradient: [gradient] * len(given))
    came = gather(rank, packed, own, context, shape.copies)
    del packed
    return rank.unary(came, own * context, own * context)


def _by_heads(rank: Sized, shape: BlockShape, given: list[Value], widths: list[int], out: int, heads: int, flexible: bool) -> Value:
    """Exchanges tokens for heads; key-value heads that are too few are repeated."""
    U = shape.seen
    total = U * sum(widths)

    def swapped(x: Value, elements: float, again: int) -> Value:
        for _ in range(again):
            x = rank.unary(x, elements, elements)
        return x

    packed = rank.value(rank.new(total), given, lambda _: [rank.new(U * width) for width in widths])
    del given
    came = swapped(packed, total, 3)
    del packed
    y = _fused(rank, [came, came, came], [U * width for width in widths], U * out, U * heads, flexible)
    del came
    return swapped(y, U * out, 4)
