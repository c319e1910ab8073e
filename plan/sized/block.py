"""A block of the model on sizes, as one rank computes it: attention, feed-forward, MoE, in the order of moe/model.py's Block.

T tokens, D width, E columns of the router, K choices of a token.
"""

from ...moe.config import AttentionKind, Products
from .attention_sizes import grouped, latent
from .autograd import Buffer, Value
from .exchange_sizes import exchanged, start_shared_expert
from .expert_sizes import compute, experts, permute, unpermute
from .layer_sizes import BlockShape, feedforward
from .operator_sizes import INDEX, Casts, Sized


def block(rank: Sized, shape: BlockShape, index: int, x: Value) -> Value:
    """x (T, D) to (T, D)."""
    config, elements = shape.config, shape.tokens * shape.config.width

    def norm(y: Value, present: bool) -> Value:
        return rank.norm(y, elements, shape.tokens) if present else y

    def residual(x: Value, y: Value) -> Value:
        scaled = rank.unary(y, elements, elements) if config.residual_multiplier != 1.0 else y
        del y
        return rank.add(x, scaled, elements)

    rank.meter.label = "attention"
    attend = latent if config.attention.kind is AttentionKind.mla else grouped
    y = attend(rank, shape, index, norm(x, config.pre_norms))
    y = norm(y, config.sandwich_norms)
    x = residual(x, y)
    rank.meter.label = "norms"
    given = norm(x, config.pre_norms)
    attended, y = y, None  # the block still refers to it
    if config.moe_layer(index):
        y = moe_layer(rank, shape, given)
    if config.dense_layer(index):
        rank.meter.label = "dense"
        dense = feedforward(rank, shape, given, "dense", config.hidden // shape.parallel.tensor, shape.parallel.tensor)
        y = dense if y is None else rank.add(y, dense, elements)
        del dense
    assert y is not None
    del given, attended
    return residual(x, norm(y, config.sandwich_norms))


def moe_layer(rank: Sized, shape: BlockShape, x: Value) -> Value:
    """x (T, D) to (T, D)."""
    c, moe, T = shape.config, shape.config.moe, shape.tokens
    x = rank.enter_experts(x)
    rank.meter.label = "router"
    weights = router(rank, shape, x)
    plan = [rank.bytes(INDEX * T * moe.top_k) for _ in range(2)]
    rank.meter.label = "experts"
    if shape.parallel.expert == 1:
        y = local(rank, shape, x, weights, plan)
        shared = start_shared_expert(rank, shape, x)()
    else:
        y, shared = exchanged(rank, shape, x, weights, plan)
    del plan, weights
    if moe.router.copy_experts or moe.router.constant_experts:
        y = rank.add(y, rank.unary(x, T * c.width, T * c.width, "x"), T * c.width)
    del x
    rank.leave_experts()
    return y if shared is None else rank.add(y, shared, T * c.width)


def router(rank: Sized, shape: BlockShape, x: Value) -> Value:
    """The weights of the choices, (T, K) in fp32, by kernels that save the logits and the choices."""
    moe, T, D = shape.config.moe, shape.tokens, shape.config.width
    E = moe.experts + moe.router.null_experts
    parts = rank.bytes(3 * rank.wide * T * E) if rank.narrow == 2 else None
    logits = rank.bytes(rank.wide * T * E)
    del parts
    held = [x.buffer, logits]

    def backward(_: Buffer) -> list[Buffer | None]:
        gradient = rank.bytes(rank.wide * T * E)
        split = rank.bytes(8 * T * E) if rank.narrow == 2 else None
        held.clear()
        result = rank.new(T * D)
        del gradient, split
        if rank.first or rank.casts is Casts.gathered:
            rank.gradients.append(rank.bytes(rank.stored * E * D))
        return [result]

    chosen = rank.keep(lambda: rank.bytes(INDEX * T * moe.top_k))
    weights = rank.keep(lambda: rank.bytes(rank.wide * T * moe.top_k))
    held.append(chosen)
    return rank.value(weights, [x], backward)


def local(rank: Sized, shape: BlockShape, x: Value, weights: Value, plan: list[Buffer]) -> Value:
    """All experts are on this rank. Products in FP8 take rows, and so does expert tensor parallelism, which shares them."""
    rows = shape.tokens * shape.config.moe.top_k
    if shape.parallel.expert_tensor == 1 and shape.config.moe.products is Products.wide:
        return experts(rank, shape, x, rows, weights, plan, sent=False)
    permuted = permute(rank, shape, x, rows, plan)
    del x
    y = compute(rank, shape, permuted, rows, sent=False)
    del permuted
    return unpermute(rank, shape, y, rows, weights, plan)
