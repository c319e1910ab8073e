"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one small latent per token.

B sequences, S new tokens, T tokens seen so far with those, D width, H heads, L width of the latent; of each head h dimensions of
a query, n of them without rotary embedding and r rotary, whose key all heads share.
"""

import torch
from torch import Tensor, nn

from .attention import KeyValueCache, attend
from .config import ModelConfig
from .linear import Linear, RMSNorm
from .rotary import Turns, logits_factor, rotate
from .softmax import softmax_of


class LatentAttention(nn.Module):
    """Heads are read off the weights' shapes, so the same code serves a tensor-parallel rank that holds some of them.

    A cache keeps the latent and the rotary key of each token, L + r numbers.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, index: int = 0) -> None:
        super().__init__()
        rope, mla = config.attention.rope, config.attention.mla
        query = mla.nope_width + mla.rope_width
        self.widths, self.interleaved = mla, rope.interleaved
        if mla.q_rank is None:
            self.q = Linear(config.width, config.heads * query, dtype)
        else:
            self.q_down = Linear(config.width, mla.q_rank, dtype)
            self.q_norm = RMSNorm(mla.q_rank, config.norm_epsilon, dtype)
            self.q_up = Linear(mla.q_rank, config.heads * query, dtype)
        self.kv_down = Linear(config.width, mla.kv_rank + mla.rope_width, dtype)
        self.kv_norm = RMSNorm(mla.kv_rank, config.norm_epsilon, dtype)
        self.kv_up = Linear(mla.kv_rank, config.heads * (mla.nope_width + mla.value_width), dtype)
        self.o = Linear(config.heads * mla.value_width, config.width, dtype)
        self.softmax = softmax_of(config, index, query, logits_factor(rope))

    def forward(self, x_BSD: Tensor, turns: Turns, cache: KeyValueCache | None = None) -> Tensor:
        """(B, S, D) to (B, S, D); each token sees itself and those before it (in its window)."""
        widths = self.widths
        q_BHSh = self.q(x_BSD) if widths.q_rank is None else self.q_up(self.q_norm(self.q_down(x_BSD)))
        latent_BTL, key_BTr = self.kv_down(x_BSD).split([widths.kv_rank, widths.rope_width], dim=-1)
        latent_B1TL = self.kv_norm(latent_BTL).unsqueeze(1)
        key_B1Tr = rotate(key_BTr.unsqueeze(1), turns, self.interleaved)
        if cache is not None:
            key_B1Tr, latent_B1TL = cache.extend(key_B1Tr, latent_B1TL)
        q_BHSh = self._turned(_heads(q_BHSh, widths.nope_width + widths.rope_width), turns)
        k_BHTn, v_BHTv = _heads(self.kv_up(latent_B1TL.squeeze(1)), widths.nope_width + widths.value_width).split(
            [widths.nope_width, widths.value_width], dim=-1
        )
        k_BHTh = torch.cat([k_BHTn, key_B1Tr.expand(-1, k_BHTn.shape[1], -1, -1)], dim=-1)
        y_BHSv = attend(
            q_BHSh, k_BHTh, v_BHTv, self.softmax, None, turns.documents_BS, turns.blocks.get(self.softmax.window is not None)
        )
        return self.o(y_BHSv.transpose(1, 2).flatten(2))

    def _turned(self, q_BHSh: Tensor, turns: Turns) -> Tensor:
        q_BHSn, q_BHSr = q_BHSh.split([self.widths.nope_width, self.widths.rope_width], dim=-1)
        return torch.cat([q_BHSn, rotate(q_BHSr, turns, self.interleaved)], dim=-1)


def _heads(x_BSC: Tensor, width: int) -> Tensor:
    return x_BSC.unflatten(-1, (-1, width)).transpose(1, 2)
