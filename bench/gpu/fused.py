"""Compares each Triton kernel of moe/kernels/ with the code that it replaces: the numbers, and the time beside that of a copy."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...moe.config import Activation, GroupScore, MoEConfig, Products, RouterConfig, Score
from ...moe.device import uses_kernels
from ...moe.dispatch import gather_rows, plan_choices, sum_rows, sum_rows_backward, weights_per_row
from ...moe.experts import _activation_backward
from ...moe.feedforward import activate
from ...moe.fp8 import product
from ...moe.grouped_products import grouped_outer
from ...moe.linear import wide_linear
from ...moe.rotary import RotaryTables, rotate
from ...moe.router import Router
from ...moe.weight_cast import add
from ...parallel.mesh import Axis
from ...parallel.vocabulary import cross_entropy
from ..timing import spread, take_turns
from .contenders import without_kernels
from .layers import milliseconds
from .machine import has
from .recorder import Recorder, Unavailable
from .row_error import LIMITS, worst_row

SIZES = {"full": (32768, 2048, 768, 128, 8), "tiny": (24, 32, 24, 6, 2)}
"""Tokens, width, hidden width, experts and choices per token: of a Qwen3-30B layer, and of a small one to try the code."""
REPEATS = {"full": (7, 1), "tiny": (2, 1)}
COPIED = {"full": 2**28, "tiny": 2**10}
"""Elements of a copy in fp32, which tells the bytes per second that are possible."""
HEAD, HEADS = 128, 32
IN_A_ROW = 8
"""Calls that are timed together, so that the host launches the next kernel while one runs."""


class Fused(NamedTuple):
    """A kernel, or with `without_kernels` the code that it replaces."""

    name: str
    work: Callable[[], list[Tensor]]
    """Returns its outputs, which are not the inputs of the next call."""
    bytes_moved: int
    """Each input read once, each output written once."""


def run(recorder: Recorder) -> None:
    if recorder.cuda and not has("triton"):
        raise Unavailable("triton is not installed, nor in .gpu/")
    for dtype in (torch.bfloat16, torch.float32):
        compare(recorder, dtype)
    compare_router(recorder)
    size = SIZES[recorder.scale]
    repeats, source = REPEATS[recorder.scale], torch.ones(COPIED[recorder.scale], device=recorder.device)
    copy = spread(take_turns({"": source.clone}, recorder.device, *repeats)[""])
    bandwidth = 2 * source.nbytes / copy.median
    recorder.fact("bytes/s of a copy", f"{bandwidth / 1e12:.2f} T")
    for fused in kernels(recorder.device, torch.bfloat16, *size):
        works = {"kernel": fused.work, "torch": without_kernels(fused.work)}
        taken = take_turns(works, recorder.device, *repeats, in_a_row=IN_A_ROW)
        kernel, without = spread(taken["kernel"]), spread(taken["torch"])
        recorder.row(
            "kernels, Qwen3-30B layer, bf16",
            kernel=fused.name,
            **{"ms (least, most)": milliseconds(kernel), "without, ms": milliseconds(without)},
            MB=round(fused.bytes_moved / 1e6),
            **{"of a copy's bytes/s": round(fused.bytes_moved / kernel.median / bandwidth, 3)},
        )


def compare(recorder: Recorder, dtype: torch.dtype) -> None:
    """Compares outputs with those of the replaced code in fp64."""
    size = SIZES["tiny"]
    found = {one.name: one.work() for one in kernels(recorder.device, dtype, *size)}
    for one in kernels(recorder.device, dtype, *size, wide=True):
        errors = [worst_row(x, y) for x, y in zip(found[one.name], without_kernels(one.work)(), strict=True)]
        recorder.below(f"{one.name}, {str(dtype).removeprefix('torch.')}", max(errors), LIMITS[dtype])


def compare_router(recorder: Recorder) -> None:
    """The logits of the router and the gradient of its weight keep the limit of fp32, on tensor cores too."""
    torch.manual_seed(0)
    tokens, width, _, experts, _ = SIZES[recorder.scale]
    x_TD, weight_ED = torch.randn(tokens, width).bfloat16(), torch.randn(experts, width) * width**-0.5
    grad_TE = torch.randn(tokens, experts)
    wide = [one.to(recorder.device).double() for one in (x_TD, weight_ED, grad_TE)]
    found = _product_and_gradients(*(one.to(recorder.device) for one in (x_TD, weight_ED, grad_TE)))
    names = "logits", "gradient of the weight", "gradient of the tokens"
    limits = LIMITS[torch.float32], LIMITS[torch.float32], LIMITS[torch.bfloat16]
    for name, value, exact, limit in zip(names, found, _product_and_gradients(*wide), limits, strict=True):
        recorder.below(f"router's product, {name}", worst_row(value, exact), limit)


def kernels(
    device: torch.device, dtype: torch.dtype, tokens: int, width: int, hidden: int, experts: int, top_k: int, wide: bool = False
) -> Iterator[Fused]:
    """Yields each kernel with random inputs, the same ones in fp64 if `wide`: rounded to `dtype` and cast."""
    generator = torch.Generator(device).manual_seed(0)
    used = torch.float64 if wide else dtype

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype).to(used)

    experts_TK = torch.rand(tokens, experts, generator=generator, device=device).topk(top_k).indices
    plan = plan_choices(experts_TK, experts, None, dropping=False)
    weights_TK = torch.rand(tokens, top_k, generator=generator, device=device).to(torch.float64 if wide else torch.float32)
    rows, item = tokens * top_k, dtype.itemsize
    many_TK = torch.rand(max(tokens, 300), experts, generator=generator, device=device).topk(top_k).indices
    some_TK = many_TK.masked_fill(torch.rand(many_TK.shape, generator=generator, device=device) < 0.5, experts)
    yield Fused(
        "plan of rows", lambda: list(plan_choices(many_TK, experts, None, dropping=False)[:3]), 3 * many_TK.nbytes + 8 * experts
    )
    padded_rows = many_TK.numel() // experts
    yield Fused(
        "plan of rows, half dropped, padded",
        lambda: [x for x in plan_choices(some_TK, experts, padded_rows, dropping=True) if x is not None],
        3 * many_TK.nbytes + 2 * many_TK.numel() + 8 * experts,
    )
    yield from _routers(device, draw(1, len(many_TK), 16), experts, top_k)
    y_RD, x_TD = draw(rows, width), draw(tokens, width)
    yield Fused("copies of tokens", lambda: [gather_rows(x_TD, plan)], item * width * (rows + tokens))
    yield Fused("weighted sum of rows", lambda: [sum_rows(y_RD, plan, weights_TK)], item * width * (rows + tokens))
    yield Fused("sum of rows", lambda: [sum_rows(y_RD, plan)], item * width * (rows + tokens))
    yield Fused(
        "backward of the sum", lambda: list(sum_rows_backward(x_TD, y_RD, plan, weights_TK)), item * width * (2 * rows + tokens)
    )
    weights_R1 = weights_per_row(weights_TK, plan)[:, None]
    for activation in Activation:
        inner_RN, grad_RF = draw(rows, activation.projections * hidden), draw(rows, hidden)
        moved = item * rows * hidden
        forward = lambda inner_RN=inner_RN, activation=activation: [activate(activation, inner_RN)]  # noqa: E731
        yield Fused(activation.value, forward, moved * (activation.projections + 1))
        backward = lambda x=inner_RN, grad=grad_RF, one=activation: _backward(one, x, grad, weights_R1)  # noqa: E731
        yield Fused(f"{activation.value} backward", backward, moved * (2 * activation.projections + 2))
    x_BHSh = draw(1, tokens, HEADS, HEAD).transpose(1, 2)
    angles = torch.randn(tokens, HEAD // 2, generator=generator, device=device, dtype=torch.float64)
    wide_dtype = torch.promote_types(used, torch.float32)
    tables = RotaryTables(angles.cos().to(wide_dtype), angles.sin().to(wide_dtype), None, {})
    for interleaved in (False, True):
        turn = lambda interleaved=interleaved: [rotate(x_BHSh, tables, interleaved)]  # noqa: E731
        yield Fused(f"rotary{', interleaved' if interleaved else ''}", turn, 2 * x_BHSh.numel() * item)
    if dtype is torch.bfloat16:
        ends_E, weights_END = plan.counts_E.cumsum(0, dtype=torch.int32), draw(experts, 2 * hidden, width)
        for products in (Products.fp8_blockwise, Products.wide):
            multiply = lambda one=products: [product(one, y_RD, weights_END, ends_E)]  # noqa: E731
            moved = item * (y_RD.numel() + weights_END.numel() + 2 * rows * hidden)
            yield Fused(f"product of the experts, {products.value}", multiply, moved)
    few = torch.full((experts,), max(1, rows // experts // 8), device=device)
    few[::2] = 0
    ends_E = few.cumsum(0, dtype=torch.int32)
    left, right = draw(int(ends_E[-1]), hidden), draw(int(ends_E[-1]), width)
    yield Fused(
        "product of groups, half of them empty", lambda: [grouped_outer(left, right, ends_E)], item * experts * hidden * width
    )

    logits_TV = draw(max(1, tokens // 8), 16 * width)
    targets_T = torch.randint(logits_TV.shape[1], logits_TV.shape[:1], generator=generator, device=device)
    entropy = lambda: list(cross_entropy(_overwritten(logits_TV), targets_T, -100, Axis(1, 0, None)))  # noqa: E731
    yield Fused("cross entropy and its gradient", entropy, 2 * item * logits_TV.numel())
    total, narrow = draw(experts, hidden, width).to(torch.promote_types(used, torch.float32)), draw(experts, hidden, width)
    yield Fused("sum of gradients of the weights", lambda: [_added(total, narrow)], (8 + item) * total.numel())
    weight_ED, grad_TE = (one.to(total.dtype) for one in (draw(experts, width), draw(tokens, experts)))
    routed = lambda: _product_and_gradients(x_TD, weight_ED, grad_TE)  # noqa: E731
    yield Fused("router's product, backward too", routed, 3 * item * x_TD.numel() + 8 * grad_TE.numel())


def _overwritten(logits_TV: Tensor) -> Tensor:
    """What `cross_entropy` overwrites: the logits, or without kernels their wide copy."""
    return logits_TV if uses_kernels(logits_TV) else logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))


def _added(total: Tensor, x: Tensor) -> Tensor:
    add(total, x)
    return total


def _product_and_gradients(x_TD: Tensor, weight_ED: Tensor, grad_TE: Tensor) -> list[Tensor]:
    x, weight = x_TD.detach().requires_grad_(), weight_ED.detach().requires_grad_()
    y = wide_linear(x, weight, grad_TE.dtype)
    return [y.detach(), *torch.autograd.grad(y, (weight, x), grad_TE)]


def _routers(device: torch.device, x_1TD: Tensor, experts: int, top_k: int) -> Iterator[Fused]:
    """Those of Qwen3 and DeepSeek-V3, with all their losses, for tokens so narrow that the product hardly counts.

    A router reads the logits and writes weights and ids; its backward pass reads the logits again and writes their gradient.
    """
    wide = torch.promote_types(x_1TD.dtype, torch.float32)
    v3 = RouterConfig(Score.sigmoid, groups=2, top_groups=1, group_score=GroupScore.top2)
    logits, choices = 4 * x_1TD.shape[1] * experts, 12 * x_1TD.shape[1] * top_k
    for name, config in {"router": RouterConfig(), "router, sigmoid, groups": v3}.items():
        made = Router(x_1TD.shape[2], MoEConfig(experts, top_k, router=config, z_coefficient=0.01), wide).to(device)
        generator, weight = torch.Generator(device).manual_seed(0), made.weight
        assert weight is not None
        weight.data.copy_(torch.randn(weight.shape, generator=generator, device=device) / 4)

        def forward(made: Router = made) -> list[Tensor]:
            routing = made(x_1TD)
            return [routing.weights_TK, routing.experts_TK, routing.stats.counts_BE, routing.stats.scores_BE, routing.stats.z]

        def both(forward: Callable[[], list[Tensor]] = forward, weight: Tensor = weight) -> list[Tensor]:
            weights_TK, _, _, scores_BE, z = forward()
            total = (weights_TK * weights_TK).sum() + (scores_BE * scores_BE).mean() + z.sqrt()
            return list(torch.autograd.grad(total, [weight]))

        yield Fused(name, torch.no_grad()(forward), logits + choices)
        yield Fused(f"{name}, forward and backward", both, 3 * logits + 2 * choices)


def _backward(activation: Activation, inner_RN: Tensor, grad_RF: Tensor, weights_R1: Tensor) -> list[Tensor]:
    return list(_activation_backward(activation, inner_RN, grad_RF, weights_R1))
