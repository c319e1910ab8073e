"""Rotary position embeddings (Su et al. 2021), and their scaling to longer contexts: linear, YaRN (Peng et al. 2023), Llama 3,
dynamic NTK (bloc97 and emozilla 2023, as in transformers), LongRoPE (Ding et al. 2024).

B sequences, H heads, S tokens, h width of a head, r rotated dimensions of it (the first r).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .config import ModelConfig, RopeConfig, RopeScaling
from .device import uses_kernels
from .kernels import operators
from .param_shapes import rotary_width
from .token_info import lengths_of, positions_of


class RotaryTables(NamedTuple):
    """Cosines and sines of the rotary angles, each (S, r / 2) or (B, 1, S, r / 2), times `rotary_factor`; and attention masks."""

    cos: Tensor
    sin: Tensor
    documents_BS: Tensor | None
    """The document of each token; None: a sequence is one document."""
    blocks: Mapping[bool, BlockMask | list[BlockMask]]
    """Block masks of layers without (False) and with (True) the window: see `block_masks` in moe/flexible_attention.py. With
    context parallelism one for each chunk of a rank's tokens."""


def rotary_tables(
    config: ModelConfig, start: int, length: int, device: torch.device, dtype: torch.dtype, documents_BS: Tensor | None = None
) -> RotaryTables:
    """Returns the tables of positions start ... start + length - 1, in `dtype` or fp32, whichever is wider.

    With `documents_BS` (see moe/token_info.py) positions restart with each document.
    """
    wide = torch.promote_types(dtype, torch.float32)
    rope = config.attention.rope
    positions, seen = torch.arange(start, start + length, device=device, dtype=torch.float64), start + length
    if documents_BS is not None:
        positions = positions_of(documents_BS).unsqueeze(1).double()
        if rope.scaling in (RopeScaling.dynamic, RopeScaling.longrope):
            seen = lengths_of(documents_BS)[:, None, :, None].double()
    angles = positions.unsqueeze(-1) * frequencies(rope, rotary_width(config), device, seen)
    factor = rotary_factor(rope)
    return RotaryTables((angles.cos() * factor).to(wide), (angles.sin() * factor).to(wide), documents_BS, {})


def rotate(x: Tensor, rotary: RotaryTables, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the first r dimensions of (B, H, S, h): dimensions (i, i + r/2), or (2i, 2i + 1) if interleaved."""
    if uses_kernels(x):
        return operators.rotate(x, rotary.cos, rotary.sin, interleaved, False)
    width = 2 * rotary.cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], rotary, interleaved), x[..., width:]], dim=-1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    rotated = (first * rotary.cos - second * rotary.sin, second * rotary.cos + first * rotary.sin)
    return (torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)).to(x.dtype)


def frequencies(rope: RopeConfig, width: int, device: torch.device, seen: int | Tensor = 0) -> Tensor:
    """Returns radians per position of each of the width / 2 pairs, in fp64.

    seen: tokens of the sequence so far, which dynamic and longrope depend on: a number, or a tensor (..., 1) for (..., width / 2).
    """
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float64) / width
    plain = rope.theta**-exponents
    match rope.scaling:
        case RopeScaling.none:
            return plain
        case RopeScaling.linear:
            return plain / rope.factor
        case RopeScaling.yarn:
            return torch.lerp(plain, plain / rope.factor, _yarn_ramp(rope, width, plain))
        case RopeScaling.llama3:
            turns = rope.original_length * plain / (2 * math.pi)
            low, high = rope.low_frequency_factor, rope.high_frequency_factor
            return torch.lerp(plain / rope.factor, plain, ((turns - low) / (high - low)).clamp(0, 1))
        case RopeScaling.dynamic:
            longer = (
                torch.as_tensor(seen, dtype=torch.float64, device=device).clamp(min=rope.original_length) / rope.original_length
            )
            return (rope.theta * (rope.factor * longer - (rope.factor - 1)) ** (width / (width - 2))) ** -exponents
        case RopeScaling.longrope:
            short, long = (plain.new_tensor(factors) for factors in (rope.short_factors, rope.long_factors))
            return plain / torch.where(torch.as_tensor(seen, device=device) > rope.original_length, long, short)


def rotary_factor(rope: RopeConfig) -> float:
    """Returns the factor of cosines and sines of YaRN and LongRoPE, whose square multiplies the logits; 1 for the others."""
    if rope.scaling not in (RopeScaling.yarn, RopeScaling.longrope):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling is RopeScaling.longrope:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_length)) if rope.factor > 1 else 1.0
    if rope.mscale and rope.mscale_all:
        return _logarithmic(rope.factor, rope.mscale) / _logarithmic(rope.factor, rope.mscale_all)
    return _logarithmic(rope.factor, 1.0)


def logits_factor(rope: RopeConfig) -> float:
    """Returns the factor of the attention's scale in DeepSeek's YaRN; 1 without YaRN."""
    return _logarithmic(rope.factor, rope.mscale_all) ** 2 if rope.scaling is RopeScaling.yarn else 1.0


def _logarithmic(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _yarn_ramp(rope: RopeConfig, width: int, like: Tensor) -> Tensor:
    """For each pair, from 0 (many turns in the original context: kept) to 1 (few turns: interpolated)."""

    def pair(turns: float) -> float:
        """Returns the (fractional) index of the pair that makes this many turns in the original context."""
        return width * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    return ((torch.arange(width // 2, device=like.device, dtype=like.dtype) - low) / span).clamp(0, 1)
