"""The kernels as operators, whose shapes fake tensors and torch.compile know. triton is imported at the first real call.

On CUDA the functions that they replace call them: in dispatch.py, feedforward.py, experts.py, linear.py, rotary.py and
parallel/vocabulary.py. T tokens, D width, K choices per token, R rows, F hidden width, N = P * F with P projections, V columns of
the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ..config import Activation

MOST_EXPERTS = 1024
"""The kernels of the router have a column of each expert in registers, those of the plan count each in each chunk of choices."""
CHUNK = 256
"""Choices that a program of the plan of rows takes."""


@torch.library.custom_op("tokenyard::copy_rows", mutates_args=())
def copy_rows(x_TD: Tensor, slot_TK: Tensor, filled_R: Tensor | None, rows: int) -> Tensor:
    """(R, D): see `dispatch.gather_rows`."""
    from . import rows as kernels

    return kernels.copy_rows(x_TD, slot_TK, filled_R, rows)


@copy_rows.register_fake
def _(x_TD: Tensor, slot_TK: Tensor, filled_R: Tensor | None, rows: int) -> Tensor:
    return x_TD.new_empty(rows, x_TD.shape[1])


@torch.library.custom_op("tokenyard::sum_rows", mutates_args=())
def sum_rows(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    """(T, D): see `dispatch.sum_rows`."""
    from . import rows

    return rows.sum_rows(y_RD, slot_TK, weights_TK)


@sum_rows.register_fake
def _(y_RD: Tensor, slot_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    return y_RD.new_empty(slot_TK.shape[0], y_RD.shape[1])


@torch.library.custom_op("tokenyard::unpermute_backward", mutates_args=())
def unpermute_backward(
    grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, filled_R: Tensor | None, weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients (R, D) of the rows and (R,) of their weights, from that of `dispatch.unpermute`."""
    from . import rows

    return rows.unpermute_backward(grad_TD, y_RD, token_R, filled_R, weights_R)


@unpermute_backward.register_fake
def _(grad_TD: Tensor, y_RD: Tensor, token_R: Tensor, filled_R: Tensor | None, weights_R: Tensor) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), y_RD.new_empty(len(y_RD), dtype=torch.float32)


@torch.library.custom_op("tokenyard::put_rows", mutates_args=("own",))
def put_rows(x: Tensor, index_R: Tensor | None, rank_R: Tensor, row_R: Tensor, address_N: Tensor, own: Tensor) -> None:
    """See `rows.put_rows`. `own` is this rank's memory, which it and other ranks overwrite."""
    from . import rows

    rows.put_rows(x, index_R, rank_R, row_R, address_N)


@put_rows.register_fake
def _(x: Tensor, index_R: Tensor | None, rank_R: Tensor, row_R: Tensor, address_N: Tensor, own: Tensor) -> None:
    return None


@torch.library.custom_op("tokenyard::count_rows", mutates_args=())
def count_rows(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(E,), (E,) and (C, E) of `dispatch.CountedChoices`."""
    from . import row_plan

    return row_plan.count_rows(experts_TK, experts, CHUNK)


@count_rows.register_fake
def _(experts_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (experts_TK.numel() + CHUNK - 1) // CHUNK
    return experts_TK.new_empty(experts), experts_TK.new_empty(experts), experts_TK.new_empty(chunks, experts)


@torch.library.custom_op("tokenyard::place_rows", mutates_args=())
def place_rows(
    experts_TK: Tensor, counts_E: Tensor, begin_E: Tensor, before_CE: Tensor, padded_rows: int | None, dropping: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `dispatch.plan_choices`: token_R, slot_TK, kept_TK, filled_R and the padded counts, empty where there are none."""
    from . import row_plan

    return row_plan.place_rows(experts_TK, counts_E, begin_E, before_CE, padded_rows, dropping, CHUNK)


@place_rows.register_fake
def _(
    experts_TK: Tensor, counts_E: Tensor, begin_E: Tensor, before_CE: Tensor, padded_rows: int | None, dropping: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    padded = padded_rows is not None
    token_R = experts_TK.new_empty(experts_TK.numel() if padded_rows is None else counts_E.shape[0] * padded_rows)
    kept_TK = experts_TK.new_empty(experts_TK.shape if dropping else 0, dtype=torch.bool)
    filled_R = experts_TK.new_empty(len(token_R) if padded else 0, dtype=torch.bool)
    return token_R, torch.empty_like(experts_TK), kept_TK, filled_R, torch.empty_like(counts_E if padded else counts_E[:0])


@torch.library.custom_op("tokenyard::route", mutates_args=())
def route(
    logits_BSE: Tensor,
    bias_E: Tensor | None,
    valid_BS: Tensor | None,
    given_BSK: Tensor | None,
    top_k: int,
    sigmoid: bool,
    softmax_after: bool,
    normalize: bool,
    scale: float,
    groups: int,
    top_groups: int,
    by_two: bool,
    counts_best: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `kernel_router.KernelRouting`, whose fields these are. Differentiable in the logits; saves them and the chosen experts.

    `given_BSK` are the experts, if they are not to be chosen. `best_BE` is empty without `counts_best`.
    """
    from . import routing

    flags, by_group = (sigmoid, softmax_after, normalize), (groups, top_groups, by_two)
    return routing.route(logits_BSE, bias_E, valid_BS, given_BSK, top_k, flags, scale, by_group, counts_best)


@route.register_fake
def _(
    logits_BSE: Tensor, bias_E: Tensor | None, valid_BS: Tensor | None, given_BSK: Tensor | None, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sequences, length, columns = logits_BSE.shape
    experts_BSK = logits_BSE.new_empty(sequences, length, top_k, dtype=torch.int64)
    counts_BE, tokens_B = experts_BSK.new_empty(sequences, columns), experts_BSK.new_empty(sequences)
    scores_BE, z = logits_BSE.new_empty(sequences, columns), logits_BSE.new_empty(())
    best_BE = experts_BSK.new_empty((sequences, columns) if rest[-1] else 0)
    return experts_BSK, logits_BSE.new_empty(sequences, length, top_k), counts_BE, tokens_B, scores_BE, z, best_BE


@torch.library.custom_op("tokenyard::route_backward", mutates_args=())
def route_backward(
    logits_BSE: Tensor,
    experts_BSK: Tensor,
    valid_BS: Tensor | None,
    grad_weights_BSK: Tensor | None,
    grad_scores_BE: Tensor | None,
    grad_z: Tensor | None,
    sigmoid: bool,
    softmax_after: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """(B, S, E): the gradient of the logits of `route`."""
    from . import routing

    grads, flags = (grad_weights_BSK, grad_scores_BE, grad_z), (sigmoid, softmax_after, normalize)
    return routing.route_backward(logits_BSE, experts_BSK, valid_BS, *grads, flags, scale)


@route_backward.register_fake
def _(logits_BSE: Tensor, *rest: Any) -> Tensor:
    return logits_BSE.new_empty(logits_BSE.shape)


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_BSE, _, valid_BS, _, _, *ctx.flags = inputs[:9]
    experts_BSK, _, counts_BE, tokens_B, _, _, best_BE = output
    ctx.save_for_backward(logits_BSE, experts_BSK, valid_BS)
    ctx.mark_non_differentiable(experts_BSK, counts_BE, tokens_B, best_BE)
    ctx.set_materialize_grads(False)


def _route_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, grad_weights_BSK, _, _, grad_scores_BE, grad_z, _ = grads
    return route_backward(*ctx.saved_tensors, grad_weights_BSK, grad_scores_BE, grad_z, *ctx.flags), *12 * [None]


route.register_autograd(_route_backward, setup_context=_save_route)


@torch.library.custom_op("tokenyard::activation", mutates_args=())
def activation(x_RN: Tensor, kind: str) -> Tensor:
    """(R, F): see `feedforward.activate`. Differentiable; saves x alone."""
    from . import activation as kernels

    return kernels.activate(x_RN, kind)


@activation.register_fake
def _(x_RN: Tensor, kind: str) -> Tensor:
    return x_RN.new_empty(x_RN.shape[0], x_RN.shape[1] // Activation(kind).projections)


@torch.library.custom_op("tokenyard::activation_backward", mutates_args=())
def activation_backward(x_RN: Tensor, grad_RF: Tensor, kind: str) -> Tensor:
    """(R, N): the gradient of the input of `activation`."""
    from . import activation as kernels

    return kernels.activate_backward(x_RN, grad_RF.contiguous(), None, kind, keeps=False)[0]


@activation_backward.register_fake
def _(x_RN: Tensor, grad_RF: Tensor, kind: str) -> Tensor:
    return x_RN.new_empty(x_RN.shape)


@torch.library.custom_op("tokenyard::weighted_activation_backward", mutates_args=("grad_RF",))
def weighted_activation_backward(x_RN: Tensor, grad_RF: Tensor, weights_R: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """See `experts._activation_backward`: the gradients of x and of the rows' weights; grad_RF becomes the weighted activation."""
    from . import activation as kernels

    return kernels.activate_backward(x_RN, grad_RF, weights_R, kind, keeps=True)


@weighted_activation_backward.register_fake
def _(x_RN: Tensor, grad_RF: Tensor, weights_R: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    return x_RN.new_empty(x_RN.shape), x_RN.new_empty(0 if weights_R is None else x_RN.shape[0], dtype=torch.float32)


def _save_input(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    x_RN, ctx.kind = inputs
    ctx.save_for_backward(x_RN)


def _activation_backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
    return activation_backward(*ctx.saved_tensors, grad_RF, ctx.kind), None


activation.register_autograd(_activation_backward, setup_context=_save_input)


@torch.library.custom_op("tokenyard::rotate", mutates_args=())
def rotate(x_BHSh: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """(B, H, S, h): see `rotary.rotate`. Differentiable in x; the backward pass rotates back."""
    from . import rotation

    return rotation.rotate(x_BHSh, cos, sin, interleaved, inverse)


@rotate.register_fake
def _(x_BHSh: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty_like(x_BHSh if x_BHSh.stride(-1) == 1 else x_BHSh.contiguous())


def _save_tables(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, grad_BHSh: Tensor) -> tuple[Tensor, None, None, None, None]:
    return rotate(grad_BHSh, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


rotate.register_autograd(_rotate_backward, setup_context=_save_tables)


@torch.library.custom_op("tokenyard::bf16_parts", mutates_args=())
def bf16_parts(x_RC: Tensor, parts: list[int], dim: int) -> Tensor:
    """The bf16 parts of fp32 numbers, whose sum they are, side by side along `dim`: see `casts.bf16_parts`."""
    from . import casts

    return casts.bf16_parts(x_RC, parts, dim)


@bf16_parts.register_fake
def _(x_RC: Tensor, parts: list[int], dim: int) -> Tensor:
    rows, columns = x_RC.shape
    size = (rows * len(parts), columns) if dim == 0 else (rows, columns * len(parts))
    return x_RC.new_empty(size, dtype=torch.bfloat16)


@torch.library.custom_op("tokenyard::add_narrow", mutates_args=("total",))
def add_narrow(total: Tensor, x: Tensor) -> None:
    """total += x for contiguous fp32 `total` and narrower x, at the speed of a copy; torch takes a fifth longer."""
    from . import casts

    casts.add_narrow(total, x)


@add_narrow.register_fake
def _(total: Tensor, x: Tensor) -> None:
    return None


@torch.library.custom_op("tokenyard::wide_mm", mutates_args=())
def wide_mm(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of bf16 matrices in fp32, as tensor cores sum it up anyway: without a wide copy of either."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@wide_mm.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


@torch.library.custom_op("tokenyard::reduce_logits", mutates_args=())
def reduce_logits(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (T,) three times: the largest logit, the sum of exp(logit - largest), and the target's logit, 0 if its column is < 0."""
    from . import logits

    return logits.reduce_logits(logits_TV, target_T)


@reduce_logits.register_fake
def _(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest_T = logits_TV.new_empty(logits_TV.shape[0], dtype=torch.float32)
    return largest_T, torch.empty_like(largest_T), torch.empty_like(largest_T)


@torch.library.custom_op("tokenyard::cross_entropy_gradient", mutates_args=("logits_TV",))
def cross_entropy_gradient(logits_TV: Tensor, target_T: Tensor, largest_T: Tensor, scale_T: Tensor) -> None:
    """Overwrites the logits with exp(logit - largest) * scale, less 1 at the target's column."""
    from . import logits

    logits.cross_entropy_gradient(logits_TV, target_T, largest_T, scale_T)


@cross_entropy_gradient.register_fake
def _(logits_TV: Tensor, target_T: Tensor, largest_T: Tensor, scale_T: Tensor) -> None:
    return None
