"""Gated DeltaNet: linear attention whose state decays and is corrected (Yang, Kautz and Hatamizadeh 2024), as in Qwen3-Next (2025).

Each value head has a state of (k, v) numbers. A token decays it by alpha, replaces the share beta of what it returns for the key by
the value, and reads it with the query (equation 10 of the paper, transposed):

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - alpha_t S_{t-1}^T k_t)^T,    y_t = S_t^T q_t

B sequences, S tokens, D width, G heads of queries and keys, H of values and states, k and v the widths of their heads, K tokens
that the convolution sees, N chunks of C tokens each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KeyValueCache, RecurrentState
from .config import ModelConfig
from .linear import Linear, RMSNorm
from .rotary import RotaryTables

CHUNK = 64
"""Tokens that are computed together: their products with each other grow with it, the number of sequential steps falls."""
NORM_EPSILON = 1e-6
"""Added to the squared length of queries and keys (transformers, flash-linear-attention)."""


class DeltaNet(nn.Module):
    """A layer of gated DeltaNet in the place of attention. Positions enter by its convolutions and decay alone.

    It infers the number of heads from the shapes of the weights: a tensor-parallel rank holds some of them, each key head with its
    value heads.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        settings = config.attention.delta
        self.key_width, self.value_width = settings.key_width, settings.value_width
        keys, values = settings.key_heads * settings.key_width, settings.value_heads * settings.value_width
        self.q, self.k = Linear(config.width, keys, dtype), Linear(config.width, keys, dtype)
        self.v, self.gate = Linear(config.width, values, dtype), Linear(config.width, values, dtype)
        self.beta = Linear(config.width, settings.value_heads, dtype)
        self.decay = Linear(config.width, settings.value_heads, dtype)
        self.dt_bias = nn.Parameter(torch.empty(settings.value_heads, dtype=dtype))
        self.a_log = nn.Parameter(torch.empty(settings.value_heads, dtype=dtype))
        self.q_conv, self.k_conv = (CausalConvolution(keys, settings.kernel, dtype) for _ in range(2))
        self.v_conv = CausalConvolution(values, settings.kernel, dtype)
        self.output_norm = RMSNorm(settings.value_width, config.norm_epsilon, dtype)
        self.o = Linear(values, config.width, dtype)

    def forward(self, x_BSD: Tensor, rotary: RotaryTables, cache: KeyValueCache | None = None) -> Tensor:
        """(B, S, D) to (B, S, D). The state is computed in fp32, or wider if the activations are.

        A cache holds the state and the last K - 1 inputs of the convolutions, however many tokens it has seen.
        """
        documents_BS, before = rotary.documents_BS, None if cache is None else cache.recurrent
        inputs = (None, None, None) if before is None else before.inputs
        (q_BSC, q_inputs), (k_BSC, k_inputs), (v_BSC, v_inputs) = (
            convolve(project(x_BSD), documents_BS, earlier)
            for project, convolve, earlier in zip(
                (self.q, self.k, self.v), (self.q_conv, self.k_conv, self.v_conv), inputs, strict=True
            )
        )
        wide = v_BSC.dtype
        q_BGSk, k_BGSk = (x_BSC.unflatten(-1, (-1, self.key_width)).transpose(1, 2) for x_BSC in (q_BSC, k_BSC))
        v_BHSv = v_BSC.unflatten(-1, (-1, self.value_width)).transpose(1, 2)
        rate_H, step_BSH = self.a_log.to(wide).exp(), F.softplus(self.decay(x_BSD).to(wide) + self.dt_bias.to(wide))
        repeats = v_BHSv.shape[1] // q_BGSk.shape[1]
        y_BHSv, state_BHkv = gated_delta_rule(
            (_unit(q_BGSk) / self.key_width**0.5).repeat_interleave(repeats, dim=1),
            _unit(k_BGSk).repeat_interleave(repeats, dim=1),
            v_BHSv,
            -(rate_H * step_BSH).transpose(1, 2),
            self.beta(x_BSD).to(wide).sigmoid().transpose(1, 2),
            None if before is None else before.state_BHkv,
            documents_BS,
        )
        if cache is not None:
            cache.recurrent = RecurrentState(cache.length + x_BSD.shape[1], (q_inputs, k_inputs, v_inputs), state_BHkv)
        y_BSC = self.output_norm(y_BHSv.transpose(1, 2)).flatten(2)
        return self.o((y_BSC * F.silu(self.gate(x_BSD).to(wide))).to(x_BSD.dtype))


class CausalConvolution(nn.Module):
    """SiLU of a weighted sum of each channel's last K inputs; the last column of weight (channels, K) is of the token itself."""

    def __init__(self, channels: int, kernel: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel, dtype=dtype))

    def forward(self, x_BSC: Tensor, documents_BS: Tensor | None = None, before_BKC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (B, S, channels), in fp32 or wider, and the last K - 1 inputs.

        before_BKC: the K - 1 inputs before these; None: there are none. With documents_BS, inputs of other documents count as zero.
        """
        kernel, length = self.weight.shape[1], x_BSC.shape[1]
        if before_BKC is None:
            before_BKC = x_BSC.new_zeros(len(x_BSC), kernel - 1, x_BSC.shape[2])
        inputs_BTC = torch.cat([before_BKC, x_BSC], dim=1)
        wide_BTC = inputs_BTC.to(torch.promote_types(x_BSC.dtype, torch.float32))
        weight_CK = self.weight.to(x_BSC.dtype).to(wide_BTC.dtype)  # as FSDP gathers it
        y_BSC = torch.zeros_like(wide_BTC[:, :length])
        for column in range(kernel):
            seen_BSC, lag = wide_BTC[:, column : column + length], min(kernel - 1 - column, length)
            if documents_BS is not None and lag:
                same_BS = F.pad(documents_BS[:, lag:] == documents_BS[:, :-lag], (lag, 0))
                seen_BSC = seen_BSC * same_BS.unsqueeze(-1)
            y_BSC = y_BSC + seen_BSC * weight_CK[:, column]
        return F.silu(y_BSC), inputs_BTC[:, length:]


def gated_delta_rule(
    q_BHSk: Tensor,
    k_BHSk: Tensor,
    v_BHSv: Tensor,
    log_alpha_BHS: Tensor,
    beta_BHS: Tensor,
    state_BHkv: Tensor | None = None,
    documents_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the outputs (B, H, S, v) and the state (B, H, k, v) after them; a single token takes one step of the recurrence.

    Within a chunk the corrected values solve a triangular system (UT transform, section 3.3 of the paper); between chunks only the
    state is passed on. `log_alpha_BHS` is the logarithm of the decay. With `documents_BS`, which begins without a state and whose
    last state has no use, each document begins with a state of zeros.
    """
    length = q_BHSk.shape[2]
    size = min(CHUNK, length)
    end = -length % size  # padding neither decays nor writes
    q_BHNCk, k_BHNCk, v_BHNCv = (F.pad(x, (0, 0, 0, end)).unflatten(2, (-1, size)) for x in (q_BHSk, k_BHSk, v_BHSv))
    log_alpha_BHNC, beta_BHNC = (F.pad(x, (0, end)).unflatten(2, (-1, size)) for x in (log_alpha_BHS, beta_BHS))
    decayed_BHNC = log_alpha_BHNC.cumsum(-1)
    pairs, reads, writes, carries = _visible(size, documents_BS, end, q_BHSk.device)
    between_BHNCC = (decayed_BHNC.unsqueeze(-1) - decayed_BHNC.unsqueeze(-2)).masked_fill(~pairs, -torch.inf).exp()
    reads_BHNC1 = (decayed_BHNC.exp() * reads).unsqueeze(-1)
    writes_BHNC1 = ((decayed_BHNC[..., -1:] - decayed_BHNC).exp() * writes).unsqueeze(-1)
    carries_BHN = decayed_BHNC[..., -1].exp() * carries
    beta_k_BHNCk = k_BHNCk * beta_BHNC.unsqueeze(-1)
    solved_BHNCx = torch.linalg.solve_triangular(
        (beta_k_BHNCk @ k_BHNCk.mT) * between_BHNCC,
        torch.cat([v_BHNCv * beta_BHNC.unsqueeze(-1), beta_k_BHNCk * reads_BHNC1], dim=-1),
        upper=False,
        unitriangular=True,
    )
    corrected_BHNCv, corrects_BHNCk = solved_BHNCx.split([v_BHSv.shape[-1], k_BHSk.shape[-1]], dim=-1)
    attended_BHNCC = (q_BHNCk @ k_BHNCk.mT) * between_BHNCC
    q_BHNCk, k_BHNCk = q_BHNCk * reads_BHNC1, k_BHNCk * writes_BHNC1
    zeros_BHkv = q_BHSk.new_zeros(*q_BHSk.shape[:2], q_BHSk.shape[-1], v_BHSv.shape[-1])
    held_BHkv, outputs = zeros_BHkv if state_BHkv is None else state_BHkv, []
    for chunk in range(q_BHNCk.shape[2]):
        values_BHCv = corrected_BHNCv[:, :, chunk] - corrects_BHNCk[:, :, chunk] @ held_BHkv
        outputs.append(q_BHNCk[:, :, chunk] @ held_BHkv + attended_BHNCC[:, :, chunk] @ values_BHCv)
        held_BHkv = carries_BHN[:, :, chunk, None, None] * held_BHkv + k_BHNCk[:, :, chunk].mT @ values_BHCv
    return torch.cat(outputs, dim=2)[:, :, :length], held_BHkv


def _visible(size: int, documents_BS: Tensor | None, end: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns booleans, with documents of the shapes (B, 1, N, C, C), twice (B, 1, N, C), and (B, 1, N).

    They say which earlier tokens of its chunk a token sees, whether it sees the state before the chunk, whether the state after the
    chunk holds the token, and whether that state holds the one before.
    """
    earlier_CC = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    if documents_BS is None:
        always_11 = torch.ones(1, 1, dtype=torch.bool, device=device)
        return earlier_CC, always_11, always_11, always_11
    documents_B1NC = F.pad(documents_BS, (0, end), value=-1).unflatten(1, (-1, size)).unsqueeze(1)
    last_B1N1 = documents_B1NC[..., -1:]
    before_B1N1 = F.pad(last_B1N1[:, :, :-1], (0, 0, 1, 0), value=-1)
    same_B1NCC = documents_B1NC.unsqueeze(-1) == documents_B1NC.unsqueeze(-2)
    return (
        same_B1NCC & earlier_CC,
        documents_B1NC == before_B1N1,
        documents_B1NC == last_B1N1,
        (before_B1N1 == last_B1N1).squeeze(-1),
    )


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + NORM_EPSILON).rsqrt()
