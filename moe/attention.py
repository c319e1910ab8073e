"""Causal grouped-query attention (Ainslie et al. 2023) and multi-head latent attention (DeepSeek-V2).

B sequences, S new tokens, T tokens so far (the new ones included), D width, H query heads, G key-value heads, h width of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask

from .config import ModelConfig, QKNorm
from .continued_attention import attend_continued
from .device import constant_when_compiled, kind_of
from .flexible_attention import attend_with_blocks, padded
from .linear import HeadsNorm, Linear, RMSNorm, compute_dtype
from .param_count import head_width
from .rotary import RotaryTables, logits_factor, rotate
from .softmax import Softmax, apply_sinks, apply_softcap, softmax_of
from .token_info import same_document

Attend = Callable[..., Tensor]
"""`attend`, or what context parallelism replaces it with."""


class Attention(nn.Module):
    """Infers the number of heads from the shapes of the weights: a tensor-parallel rank holds some of them."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, index: int = 0) -> None:
        super().__init__()
        settings, width = config.attention, head_width(config)
        self.head_width, self.interleaved, self.clip = width, settings.rope.interleaved, settings.clip_qkv
        linear = partial(Linear, dtype=dtype, products=config.products)
        self.q = linear(config.width, config.heads * width, bias=settings.qkv_bias)
        self.k = linear(config.width, config.kv_heads * width, bias=settings.qkv_bias)
        self.v = linear(config.width, config.kv_heads * width, bias=settings.qkv_bias)
        self.o = linear(config.heads * width, config.width, bias=settings.output_bias)
        self.q_norm, self.k_norm = _norm(config, config.heads, dtype), _norm(config, config.kv_heads, dtype)
        self.gate = linear(config.width, config.heads * width, bias=settings.qkv_bias) if settings.output_gate else None
        self.sinks = nn.Parameter(torch.empty(config.heads, dtype=dtype)) if settings.sinks else None
        self.softmax = softmax_of(config, index, width)
        self.attend: Attend = attend

    def forward(self, x_BSD: Tensor, rotary: RotaryTables, cache: "KeyValueCache | None" = None) -> Tensor:
        """(B, S, D) to (B, S, D); each token attends to itself and to earlier tokens (in its window)."""
        q_BHSh = rotate(self._heads(self.q(x_BSD), self.q_norm), rotary, self.interleaved)
        k_BGTh = rotate(self._heads(self.k(x_BSD), self.k_norm), rotary, self.interleaved)
        v_BGTh = self._heads(self.v(x_BSD), None)
        if cache is not None:
            k_BGTh, v_BGTh = cache.extend(k_BGTh, v_BGTh)
        y_BHSh = self.attend(
            q_BHSh,
            k_BGTh,
            v_BGTh,
            self.softmax,
            self.sinks,
            rotary.documents_BS,
            rotary.blocks.get(self.softmax.window is not None),
        )
        y_BSC = y_BHSh.transpose(1, 2).flatten(2)
        return self.o(y_BSC if self.gate is None else y_BSC * self.gate(x_BSD).sigmoid())

    def _heads(self, x_BSC: Tensor, norm: nn.Module | None) -> Tensor:
        x_BSHh = x_BSC.unflatten(-1, (-1, self.head_width))
        x_BSHh = x_BSHh if norm is None else norm(x_BSHh)
        return (x_BSHh if self.clip is None else x_BSHh.clamp(-self.clip, self.clip)).transpose(1, 2)


def attend(
    q_BHSh: Tensor,
    k_BGTh: Tensor,
    v_BGTh: Tensor,
    softmax: Softmax,
    sinks_H: Tensor | None = None,
    documents_BS: Tensor | None = None,
    blocks: BlockMask | None = None,
) -> Tensor:
    """Returns (B, H, S, width of v); the queries are of the last S of T tokens. Sinks (gpt-oss) are logits without a value.

    With `documents_BS` (of all T tokens) tokens attend only to their own document. `blocks` (see moe/flexible_attention.py) is the
    mask of window and documents together; with it no tensor of shape (S, S) is made.
    """
    if softmax.largest_H is not None:
        keep_largest_logits(softmax.largest_H, q_BHSh, k_BGTh, softmax, documents_BS)
    if blocks is not None:
        return attend_with_blocks(q_BHSh, k_BGTh, v_BGTh, softmax, sinks_H, blocks)
    new, seen, dtype = q_BHSh.shape[2], k_BGTh.shape[2], q_BHSh.dtype
    q_BHSh, k_BGTh, v_BGTh = (x.to(compute_dtype(x)) for x in (q_BHSh, k_BGTh, v_BGTh))
    if sinks_H is not None or softmax.softcap is not None:
        return _attend_unfused(q_BHSh, k_BGTh, v_BGTh, softmax, sinks_H, documents_BS).to(dtype)
    unlimited = softmax.window is None or softmax.window >= seen
    causal = unlimited and documents_BS is None
    mask = None if causal else attention_mask(new, seen, softmax.window, q_BHSh.device, documents_BS)
    return fused_attention(q_BHSh, k_BGTh, v_BGTh, softmax.scale, mask, causal).to(dtype)


QUERIES = 256
"""Queries whose logits `keep_largest_logits` computes at a time."""


@torch.no_grad()
def keep_largest_logits(
    largest_H: Tensor, q_BHSh: Tensor, k_BGTh: Tensor, softmax: Softmax, documents_BS: Tensor | None = None
) -> None:
    """Raises `largest_H`, in place, to the largest logit between a token of each head and a token that it attends to.

    Takes the operands as `attend` does, and as long as its product of queries and keys. A maximum that comes twice changes nothing,
    so recomputation does not.
    """
    new, seen, groups = q_BHSh.shape[2], k_BGTh.shape[2], k_BGTh.shape[1]
    q_BHSh, k_BGTh = (x.to(compute_dtype(x)) for x in (q_BHSh, k_BGTh))
    for first in range(0, new, QUERIES):
        q_BGRsh = q_BHSh[:, :, first : first + QUERIES].unflatten(1, (groups, -1))
        count = q_BGRsh.shape[3]
        last = seen - new + first + count
        documents = None if documents_BS is None else documents_BS[:, :last]
        seen_BGRsT = attention_mask(count, last, softmax.window, q_BHSh.device, documents)
        seen_BGRsT = seen_BGRsT if documents is None else seen_BGRsT.unsqueeze(1)
        logits_BGRsT = (q_BGRsh @ k_BGTh[:, :, None, :last].transpose(-1, -2)).to(largest_H.dtype) * softmax.scale
        torch.maximum(largest_H, logits_BGRsT.masked_fill(~seen_BGRsT, -torch.inf).amax((0, 3, 4)).flatten(), out=largest_H)


def fused_attention(q_BHSh: Tensor, k_BGTh: Tensor, v_BGTv: Tensor, scale: float, mask_ST: Tensor | None, causal: bool) -> Tensor:
    """Returns (B, H, S, v), by torch's own kernels. A dry run replaces this function.

    Causal attention of the last S of T tokens makes no mask either: on CUDA a kernel aligns the last query with the last key.
    """
    width, new, seen = v_BGTv.shape[-1], q_BHSh.shape[2], k_BGTh.shape[2]
    continued = causal and 1 < new < seen
    if continued and kind_of(q_BHSh) == "cpu":
        return attend_continued(q_BHSh, k_BGTh, padded(v_BGTv, k_BGTh.shape[-1]), scale)[..., :width]
    if kind_of(q_BHSh) == "cuda":
        k_BGTh, v_BGTv = _prepare_keys_and_values(q_BHSh, k_BGTh, v_BGTv, continued)
    grouped, causal = q_BHSh.shape[1] != k_BGTh.shape[1], causal and new == seen
    if continued:
        from torch.nn.attention.bias import causal_lower_right  # imports the compiler, which takes a second

        mask_ST = causal_lower_right(new, seen)
    y_BHSv = F.scaled_dot_product_attention(q_BHSh, k_BGTh, v_BGTv, mask_ST, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y_BHSv if y_BHSv.shape[-1] == width else y_BHSv[..., :width]


def _prepare_keys_and_values(q_BHSh: Tensor, k_BGTh: Tensor, v_BGTv: Tensor, continued: bool = False) -> tuple[Tensor, Tensor]:
    """Returns keys and values in shapes that have a fused CUDA kernel; without one, torch makes a tensor of (B, H, S, T).

    The kernel for fp32 has no grouped queries. Flash attention needs values as wide as keys; only cuDNN's kernel does not, which
    does not take `continued` attention, of the last S of T tokens.
    """
    if q_BHSh.dtype == torch.float32:
        repeats = q_BHSh.shape[1] // k_BGTh.shape[1]
        return _repeated(k_BGTh, repeats), _repeated(v_BGTv, repeats)
    width, narrower = q_BHSh.shape[-1], v_BGTv.shape[-1]
    if narrower < width and (continued or not _by_cudnn(width, narrower, q_BHSh.dtype, q_BHSh.device)):
        v_BGTv = padded(v_BGTv, width)
    return k_BGTh, v_BGTv


@constant_when_compiled
def _by_cudnn(width: int, value_width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch selects cuDNN's kernel for heads of these widths in training."""
    q_11Sh, v_11Sv = (torch.empty(1, 1, 128, each, dtype=dtype, device=device).requires_grad_() for each in (width, value_width))
    chosen = torch._fused_sdp_choice(q_11Sh, q_11Sh, v_11Sv, is_causal=True)  # pyright: ignore[reportPrivateImportUsage]
    return chosen == SDPBackend.CUDNN_ATTENTION.value


def _repeated(x_BGTh: Tensor, repeats: int) -> Tensor:
    return x_BGTh if repeats == 1 else x_BGTh.repeat_interleave(repeats, dim=1)


def attention_mask(new: int, seen: int, window: int | None, device: torch.device, documents_BS: Tensor | None = None) -> Tensor:
    """Booleans (new, seen), or (B, 1, new, seen) with documents: which keys each of the last `new` tokens attends to."""
    mask_ST = torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new)
    mask_ST = mask_ST if window is None else mask_ST.triu(seen - new - window + 1)
    return mask_ST if documents_BS is None else mask_ST & same_document(documents_BS, new)


def _attend_unfused(
    q_BHSh: Tensor, k_BGTh: Tensor, v_BGTh: Tensor, softmax: Softmax, sinks_H: Tensor | None, documents_BS: Tensor | None
) -> Tensor:
    """Attention with soft cap and sinks, which torch's fused attention does not have; logits in fp32 or wider."""
    wide = torch.promote_types(q_BHSh.dtype, torch.float32)
    repeats = q_BHSh.shape[1] // k_BGTh.shape[1]
    k_BHTh, v_BHTh = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTh, v_BGTh))
    logits_BHST = (q_BHSh @ k_BHTh.transpose(-1, -2)).to(wide) * softmax.scale
    if softmax.softcap is not None:
        logits_BHST = apply_softcap(logits_BHST, softmax.softcap)
    hidden = ~attention_mask(logits_BHST.shape[2], logits_BHST.shape[3], softmax.window, q_BHSh.device, documents_BS)
    logits_BHST = logits_BHST.masked_fill(hidden, -torch.inf)
    y_BHSh = logits_BHST.softmax(dim=-1).to(v_BHTh.dtype) @ v_BHTh
    if sinks_H is None:
        return y_BHSh
    return apply_sinks(y_BHSh, logits_BHST.logsumexp(dim=-1), sinks_H).to(y_BHSh.dtype)


class RecurrentState(NamedTuple):
    """What a layer of gated DeltaNet keeps of the tokens so far."""

    tokens: int
    inputs: tuple[Tensor, Tensor, Tensor]
    """Of the convolutions of queries, keys and values: the last inputs, (B, kernel - 1, channels)."""
    state_BHkv: Tensor


class KeyValueCache:
    """Keys and values, or their latents, of the tokens so far in one attention layer, for generation; or a recurrent state."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.recurrent: RecurrentState | None = None

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        if self.recurrent is not None:
            return self.recurrent.tokens
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys_BGSh: Tensor, values_BGSh: Tensor) -> tuple[Tensor, Tensor]:
        """Appends to the cache and returns all keys and values in it."""
        if self.keys is not None and self.values is not None:
            keys_BGSh = torch.cat([self.keys, keys_BGSh], dim=2)
            values_BGSh = torch.cat([self.values, values_BGSh], dim=2)
        self.keys, self.values = keys_BGSh, values_BGSh
        return keys_BGSh, values_BGSh


def _norm(config: ModelConfig, heads: int, dtype: torch.dtype) -> nn.Module | None:
    match config.attention.qk_norm:
        case QKNorm.none:
            return None
        case QKNorm.head:
            return RMSNorm(head_width(config), config.norm_epsilon, dtype, config.zero_centered_norms)
        case QKNorm.full:
            return HeadsNorm(heads * head_width(config), config.norm_epsilon, dtype, config.zero_centered_norms)


# Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from a small latent per token.
#
# L width of the latent; h dimensions of a head's query: n without rotary embedding, and r rotary, whose key all heads share.


class LatentAttention(nn.Module):
    """Infers the number of heads from the shapes of the weights: a tensor-parallel rank holds some of them.

    A cache holds the latent and the rotary key of each token, L + r numbers.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, index: int = 0) -> None:
        super().__init__()
        rope, mla = config.attention.rope, config.attention.mla
        query, epsilon = mla.nope_width + mla.rope_width, mla.norm_epsilon or config.norm_epsilon
        self.widths, self.interleaved, self.model_width = mla, rope.interleaved, config.width
        linear = partial(Linear, dtype=dtype, products=config.products)
        if mla.q_rank is None:
            self.q = linear(config.width, config.heads * query)
        else:
            self.q_down = linear(config.width, mla.q_rank)
            self.q_norm = RMSNorm(mla.q_rank, epsilon, dtype, config.zero_centered_norms)
            self.q_up = linear(mla.q_rank, config.heads * query)
        self.kv_down = linear(config.width, mla.kv_rank + mla.rope_width)
        self.kv_norm = RMSNorm(mla.kv_rank, epsilon, dtype, config.zero_centered_norms)
        self.kv_up = linear(mla.kv_rank, config.heads * (mla.nope_width + mla.value_width))
        self.o = linear(config.heads * mla.value_width, config.width)
        self.softmax = softmax_of(config, index, query, logits_factor(rope))
        self.attend: Attend = attend

    def forward(self, x_BSD: Tensor, rotary: RotaryTables, cache: KeyValueCache | None = None) -> Tensor:
        """(B, S, D) to (B, S, D); each token attends to itself and to earlier tokens (in its window)."""
        widths = self.widths
        q_BHSh = self.q(x_BSD) if widths.q_rank is None else self.q_up(self._scaled(self.q_norm(self.q_down(x_BSD))))
        latent_BTL, key_BTr = self.kv_down(x_BSD).split([widths.kv_rank, widths.rope_width], dim=-1)
        latent_B1TL = self._scaled(self.kv_norm(latent_BTL)).unsqueeze(1)
        key_B1Tr = rotate(key_BTr.unsqueeze(1), rotary, self.interleaved)
        if cache is not None:
            key_B1Tr, latent_B1TL = cache.extend(key_B1Tr, latent_B1TL)
        q_BHSn, q_BHSr = _split_heads(q_BHSh, widths.nope_width, widths.rope_width)
        q_BHSh = torch.cat([q_BHSn, rotate(q_BHSr, rotary, self.interleaved)], dim=-1)
        k_BHTn, v_BHTv = _split_heads(self.kv_up(latent_B1TL.squeeze(1)), widths.nope_width, widths.value_width)
        k_BHTh = torch.cat([k_BHTn, key_B1Tr.expand(-1, k_BHTn.shape[1], -1, -1)], dim=-1)
        y_BHSv = self.attend(
            q_BHSh, k_BHTh, v_BHTv, self.softmax, None, rotary.documents_BS, rotary.blocks.get(self.softmax.window is not None)
        )
        return self.o(y_BHSv.transpose(1, 2).flatten(2))

    def _scaled(self, latent_BSL: Tensor) -> Tensor:
        return latent_BSL * (self.model_width / latent_BSL.shape[-1]) ** 0.5 if self.widths.scale_latents else latent_BSL


def _split_heads(x_BSC: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """(B, S, H * (first + second)) to (B, H, S, first) and (B, H, S, second)."""
    first_BHSh, second_BHSh = x_BSC.unflatten(-1, (-1, first + second)).transpose(1, 2).split([first, second], dim=-1)
    return first_BHSh, second_BHSh
