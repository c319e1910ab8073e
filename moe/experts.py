"""The experts of one layer as two grouped products, with gate and up in one tensor.

E experts on this device, R rows in the order of the experts, T tokens, K choices of each, D width, F hidden width of an expert, P
projections (gate and up, or up alone).
"""

import torch
from torch import Tensor, nn

from .activations import activate, projections
from .config import Activation
from .expert_function import ExpertFunction
from .rows import Choices


class Experts(nn.Module):
    """down_e(f(gate_e(x), up_e(x))) for the rows x of each expert e; no loop over experts.

    Weights: gate_up (E, P, F, D) and down (E, D, F), with `bias` also gate_up_bias (E, P, F) and down_bias (E, D); dimension 0 is
    the expert's global id, whatever rank holds it.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        dtype: torch.dtype,
        activation: Activation = Activation.swiglu,
        bias: bool = False,
    ) -> None:
        super().__init__()
        parts = projections(activation)
        self.activation = activation
        self.gate_up = nn.Parameter(torch.empty(experts, parts, hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype))
        self.gate_up_bias = nn.Parameter(torch.empty(experts, parts, hidden, dtype=dtype)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, width, dtype=dtype)) if bias else None
        self.adds_bias = bias
        """Of `down`: False where the output is one part of a sum and another part has the bias already."""

    def forward(self, x: Tensor, counts_E: Tensor, choices: Choices | None = None) -> Tensor:
        """Rows (R, D) to (R, D); counts_E (int64) says how many rows each expert has, and they sum to R.

        With `choices` tokens (T, D) to (T, D): rows are made of the tokens, and each token gets the weighted sum of its rows.
        """
        gate_up, down, dtype = self.gate_up.to(x.dtype).flatten(1, 2), self.down.to(x.dtype), x.dtype
        gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias.to(dtype).flatten(1)
        down_bias = self.down_bias.to(dtype) if self.down_bias is not None and self.adds_bias else None
        weights_TK, plan = (None, ()) if choices is None else (choices.weights_TK, choices.plan)
        tensors = x, gate_up, down, gate_up_bias, down_bias, weights_TK, counts_E
        return ExpertFunction.apply(self.activation, *tensors, *plan)  # pyright: ignore[reportReturnType]


def experts_by_loop(experts: Experts, x_RD: Tensor, counts_E: Tensor) -> Tensor:
    """The same function, one expert after the other: the reference of the tests."""
    outputs = []
    for expert, rows in enumerate(x_RD.split(counts_E.tolist())):
        inner = rows @ experts.gate_up[expert].flatten(0, 1).T
        if experts.gate_up_bias is not None:
            inner = inner + experts.gate_up_bias[expert].flatten()
        output = activate(experts.activation, inner) @ experts.down[expert].T
        outputs.append(output if experts.down_bias is None else output + experts.down_bias[expert])
    return torch.cat(outputs)
