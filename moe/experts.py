"""The experts of one layer as two grouped products: SwiGLU with gate and up in one tensor.

E experts on this device, R rows in the order of the experts, D width, F hidden width of an expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .grouped import grouped_mm


class Experts(nn.Module):
    """down_e(silu(gate_e(x)) * up_e(x)) for the rows x of each expert e; no loop over experts.

    Weights: gate_up (E, 2, F, D) and down (E, D, F); dimension 0 is the expert's global id, whatever rank holds it.
    """

    def __init__(self, experts: int, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype))

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """(R, D) to (R, D); counts_E (int64) says how many rows each expert has, and they sum to R."""
        ends_E = counts_E.cumsum(0).to(torch.int32)
        both_RF = grouped_mm(x_RD, self.gate_up.to(x_RD.dtype).flatten(1, 2), ends_E)
        gate_RF, up_RF = both_RF.chunk(2, dim=-1)
        return grouped_mm(F.silu(gate_RF) * up_RF, self.down.to(x_RD.dtype), ends_E)


def experts_by_loop(experts: Experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The same function, one expert after the other: the reference of the tests."""
    outputs = []
    for rows, gate_up, down in zip(x_RD.split(counts_E.tolist()), experts.gate_up, experts.down, strict=True):
        gate, up = rows @ gate_up[0].T, rows @ gate_up[1].T
        outputs.append((F.silu(gate) * up) @ down.T)
    return torch.cat(outputs)
