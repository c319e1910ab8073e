"""Causal grouped-query attention (Ainslie et al. 2023) with rotary position embeddings (Su et al. 2021).

B sequences, S new tokens, D width, H query heads, G key-value heads, h width of a head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .linear import Linear


class Turns(NamedTuple):
    """Cosines and sines of the rotary angles, each of shape (S, h / 2)."""

    cos: Tensor
    sin: Tensor


class Attention(nn.Module):
    """Heads are read off the weights' shapes, so the same code serves a tensor-parallel rank that holds some of them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_width = config.head_width or config.width // config.heads
        self.q = Linear(config.width, config.heads * self.head_width, dtype)
        self.k = Linear(config.width, config.kv_heads * self.head_width, dtype)
        self.v = Linear(config.width, config.kv_heads * self.head_width, dtype)
        self.o = Linear(config.heads * self.head_width, config.width, dtype)

    def forward(self, x_BSD: Tensor, turns: Turns, cache: "KeyValueCache | None" = None) -> Tensor:
        """(B, S, D) to (B, S, D); each token sees itself and those before it."""
        q_BHSh, k_BGSh, v_BGSh = (self._heads(project(x_BSD)) for project in (self.q, self.k, self.v))
        q_BHSh, k_BGSh = rotate(q_BHSh, turns), rotate(k_BGSh, turns)
        mask = None
        if cache is not None:
            mask = cache.mask(q_BHSh.shape[2], q_BHSh.device)
            k_BGSh, v_BGSh = cache.extend(k_BGSh, v_BGSh)
        y_BHSh = F.scaled_dot_product_attention(
            q_BHSh, k_BGSh, v_BGSh, attn_mask=mask, is_causal=mask is None, enable_gqa=q_BHSh.shape[1] != k_BGSh.shape[1]
        )
        return self.o(y_BHSh.transpose(1, 2).flatten(2))

    def _heads(self, x_BSC: Tensor) -> Tensor:
        return x_BSC.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


class KeyValueCache:
    """Keys and values of the tokens seen so far by one attention layer, for generation."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return 0 if self.keys is None else self.keys.shape[2]

    def mask(self, new: int, device: torch.device) -> Tensor:
        """(new, length + new) booleans: which keys each of the `new` tokens sees."""
        return torch.ones(new, self.length + new, dtype=torch.bool, device=device).tril(self.length)

    def extend(self, keys_BGSh: Tensor, values_BGSh: Tensor) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values."""
        if self.keys is not None and self.values is not None:
            keys_BGSh = torch.cat([self.keys, keys_BGSh], dim=2)
            values_BGSh = torch.cat([self.values, values_BGSh], dim=2)
        self.keys, self.values = keys_BGSh, values_BGSh
        return keys_BGSh, values_BGSh


def rotary_turns(config: ModelConfig, start: int, length: int, device: torch.device, dtype: torch.dtype) -> Turns:
    """The turns of positions start ... start + length - 1, in `dtype` or fp32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    width = config.head_width or config.width // config.heads
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    positions = torch.arange(start, start + length, device=device, dtype=torch.float64)
    angles = torch.outer(positions, config.attention.rope.theta**-exponents)
    return Turns(angles.cos().to(wide), angles.sin().to(wide))


def rotate(x: Tensor, turns: Turns) -> Tensor:
    """Turn the pairs (x[i], x[i + h/2]) of the last dimension of (B, H, S, h) by each position's angles."""
    first, second = x.chunk(2, dim=-1)
    turned = (first * turns.cos - second * turns.sin, second * turns.cos + first * turns.sin)
    return torch.cat(turned, dim=-1).to(x.dtype)
