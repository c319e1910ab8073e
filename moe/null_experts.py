"""What null experts add to a token's output: nothing (zero), the token itself (copy), or a learned constant (MoE++'s three kinds).

T tokens, D width, K chosen per token, C constant experts. A router's columns are the experts, then the null experts that add
nothing, copy experts, constant experts.
"""

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .linear import Linear, wide_linear


class NullExperts(nn.Module):
    """Copy experts return the token (identity experts of LongCat-Flash, arXiv:2509.01322; MoE++, arXiv:2410.07348).

    Constant experts return a x + b v, where v is learned and (a, b) is the softmax of a projection of x (MoE++).
    """

    def __init__(self, width: int, config: MoEConfig, dtype: torch.dtype) -> None:
        super().__init__()
        router = config.router
        self.copies, self.constants = router.copy_experts, router.constant_experts
        self.first = config.experts + router.null_experts - self.copies - self.constants
        self.mixing = Linear(width, 2 * self.constants, dtype) if self.constants else None
        self.vectors = Linear(self.constants, width, dtype) if self.constants else None

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Returns (T, D) in the dtype of x: the weighted sum over the choices that are copy or constant experts."""
        constant = self.first + self.copies
        copied_TK = (experts_TK >= self.first) & (experts_TK < constant)
        kept_T1 = (weights_TK * copied_TK).sum(1, keepdim=True)
        if self.mixing is None or self.vectors is None:
            return (x_TD * kept_T1).to(x_TD.dtype)
        columns_C = torch.arange(constant, constant + self.constants, device=x_TD.device)
        weights_TC = (weights_TK.unsqueeze(-1) * (experts_TK.unsqueeze(-1) == columns_C)).sum(1)
        mixture_TC2 = wide_linear(x_TD, self.mixing.weight, weights_TK.dtype).unflatten(-1, (self.constants, 2)).softmax(-1)
        kept_TC, added_TC = (weights_TC.unsqueeze(-1) * mixture_TC2).unbind(-1)
        added_TD = wide_linear(added_TC, self.vectors.weight, weights_TK.dtype)
        return (x_TD * (kept_T1 + kept_TC.sum(1, keepdim=True)) + added_TD).to(x_TD.dtype)
