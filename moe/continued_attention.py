"""Causal attention of the last S of T tokens on a CPU, without a mask: torch's kernel would want one of (S, T) in floating point.

B sequences, H query heads, G key-value heads, h width of a head, of keys and of values.
"""

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_continued(q_BHSh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor, scale: float) -> Tensor:
    """Returns (B, H, S, h): all of the T - S earlier keys, and the last S causally, joined by the logarithms of their sums."""
    return _Continued.apply(q_BHSh, k_BGTh, v_BGTh, scale)  # pyright: ignore[reportReturnType]


class _Continued(torch.autograd.Function):
    """The kernel's backward pass takes each part's keys with the output and the logarithms of all (as in ring attention)."""

    @staticmethod
    def forward(ctx: Any, q_BHSh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor, scale: float) -> Tensor:
        earlier = k_BGTh.shape[2] - q_BHSh.shape[2]
        y_BHSh, lse_BHS = _forward(q_BHSh, k_BGTh[:, :, :earlier], v_BGTh[:, :, :earlier], 0.0, False, scale=scale)
        own_BHSh, own_BHS = _forward(q_BHSh, k_BGTh[:, :, earlier:], v_BGTh[:, :, earlier:], 0.0, True, scale=scale)
        all_BHS = torch.logaddexp(lse_BHS, own_BHS)
        y_BHSh = y_BHSh * (lse_BHS - all_BHS).exp().unsqueeze(-1) + own_BHSh * (own_BHS - all_BHS).exp().unsqueeze(-1)
        ctx.save_for_backward(q_BHSh, k_BGTh, v_BGTh, y_BHSh, all_BHS)
        ctx.scale = scale
        return y_BHSh

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q_BHSh, k_BGTh, v_BGTh, y_BHSh, all_BHS = ctx.saved_tensors
        earlier = k_BGTh.shape[2] - q_BHSh.shape[2]
        (q_one, k_one, v_one), (q_two, k_two, v_two) = (
            _backward(grads[0], q_BHSh, k_BGTh[:, :, part], v_BGTh[:, :, part], y_BHSh, all_BHS, 0.0, causal, scale=ctx.scale)
            for part, causal in ((slice(earlier), False), (slice(earlier, None), True))
        )
        return q_one + q_two, torch.cat([k_one, k_two], dim=2), torch.cat([v_one, v_two], dim=2), None
