"""FlexAttention (Dong et al. 2024), one kernel that skips masked blocks: for windows, documents, soft cap and sinks.

No tensor of shape (S, S) is made: the mask is known by blocks of tokens and, inside partly masked blocks, by a function.
B sequences, S tokens of each, N blocks of a sequence, H query heads, G key-value heads, h width of a head, v width of a value.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .config import ModelConfig
from .device import kind_of
from .softmax import Softmax, apply_sinks, apply_softcap

BLOCK = 128
"""Tokens of a block."""
MIN_HEAD_WIDTH = 16
"""The kernel needs heads at least this wide; narrower ones are padded with zeros."""

MAX_RECOMPILES = 64
"""Kinds of layer, batch sizes and dtypes that one process may compile; torch's limit is 8."""


def block_masks(
    config: ModelConfig, ids_BS: Tensor, dtype: torch.dtype, documents_BS: Tensor | None = None, queries: range | None = None
) -> dict[bool, BlockMask]:
    """Returns the masks of layers without (False) and with (True) the window, which all layers of a kind share.

    A kind of layer that uses torch's fused attention has none: on CPUs, in fp64 (no kernel), and if attention is plainly causal.
    `queries`: the positions of a run of queries; None: all.
    """
    if kind_of(ids_BS) != "cuda" or dtype == torch.float64:
        return {}
    settings, length, masks = config.attention, ids_BS.shape[1], {}
    run = queries or range(length)
    for windowed in sorted({config.windowed_layer(index) for index in range(config.layers + config.mtp_depth)}):
        window = settings.window if windowed and settings.window is not None and settings.window < length else None
        if settings.sinks or settings.softcap is not None or window is not None or documents_BS is not None:
            masks[windowed] = block_mask(run.stop, window, ids_BS.device, documents_BS, run.start)
    return masks


def block_mask(
    length: int, window: int | None, device: torch.device, documents_BS: Tensor | None = None, first: int = 0
) -> BlockMask:
    """Computes for each pair of blocks whether some or all of its pairs of tokens are visible. Documents are numbered in order.

    Of `length` tokens, those from `first` on are queries, Q blocks of them.
    """
    first_N = torch.arange(0, length, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp(max=length - 1)
    first_Q, last_Q = first_N, last_N
    if first:
        first_Q = torch.arange(first, length, BLOCK, device=device)
        last_Q = (first_Q + BLOCK - 1).clamp(max=length - 1)
    some_BQN = (first_N <= last_Q[:, None]).unsqueeze(0)
    whole_Q = first_Q + BLOCK <= length
    every_BQN = ((last_N <= first_Q[:, None]) & whole_Q[:, None]).unsqueeze(0)
    if window is not None:
        some_BQN = some_BQN & (first_Q[:, None] - last_N < window)
        every_BQN = every_BQN & (last_Q[:, None] - first_N < window)
    if documents_BS is not None:
        documents_BS = documents_BS.int()
        from_BN, to_BN = documents_BS[:, first_N], documents_BS[:, last_N]
        from_BQ, to_BQ = documents_BS[:, first_Q], documents_BS[:, last_Q]
        some_BQN = some_BQN & (to_BN[:, None, :] >= from_BQ[:, :, None])
        every_BQN = every_BQN & (from_BN[:, None, :] == to_BQ[:, :, None])
    part_BQN, mask_mod = some_BQN & ~every_BQN, _mask_mod(first, window, documents_BS)
    of_queries, of_keys = (
        (*_block_indices(part_BQN), *_block_indices(every_BQN)),
        (*_block_indices(part_BQN.mT), *_block_indices(every_BQN.mT)),
    )
    return BlockMask((length - first, length), *of_queries, *of_keys, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)


def attend_with_blocks(
    q_BHSh: Tensor, k_BGSh: Tensor, v_BGSv: Tensor, softmax: Softmax, sinks_H: Tensor | None, blocks: BlockMask
) -> Tensor:
    """Returns `attend` of moe/attention.py with a block mask: (B, H, S, v) in the dtype of v. Compiled on a GPU."""
    # Not kind_of: fake tensors that stand for a GPU need no compiled code, and neither does code that is compiled already.
    run = _compiled() if q_BHSh.device.type == "cuda" and not torch.compiler.is_compiling() else _attend
    return run(q_BHSh, k_BGSh, v_BGSv, softmax, sinks_H, blocks)


def flexible_attention(
    q_BHSh: Tensor, k_BGSh: Tensor, v_BGSv: Tensor, softmax: Softmax, blocks: BlockMask
) -> tuple[Tensor, Tensor]:
    """Returns (B, H, S, v) and the log-sum-exp (B, H, S) of the logits. A dry run replaces this function."""
    score_mod = None if softmax.softcap is None else _score_mod(softmax.softcap)
    q_BHSh, k_BGSh, wide_BGSv = (padded(x, MIN_HEAD_WIDTH) for x in (q_BHSh, k_BGSh, v_BGSv))
    y_BHSv, aux = flex_attention(
        q_BHSh,
        k_BGSh,
        wide_BGSv,
        score_mod,
        blocks,
        softmax.scale,
        q_BHSh.shape[1] != k_BGSh.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    assert aux.lse is not None
    return y_BHSv[..., : v_BGSv.shape[-1]], aux.lse


def padded(x: Tensor, width: int) -> Tensor:
    """Pads x with zeros up to `width` in the last dimension."""
    return x if x.shape[-1] >= width else F.pad(x, (0, width - x.shape[-1]))


def _attend(q_BHSh: Tensor, k_BGSh: Tensor, v_BGSv: Tensor, softmax: Softmax, sinks_H: Tensor | None, blocks: BlockMask) -> Tensor:
    y_BHSv, logsumexp_BHS = flexible_attention(q_BHSh, k_BGSh, v_BGSv, softmax, blocks)
    return y_BHSv if sinks_H is None else apply_sinks(y_BHSv, logsumexp_BHS, sinks_H).to(v_BGSv.dtype)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """One function for all layers. Beyond the limit `fullgraph` raises; without it torch would run eagerly and make (B,H,S,S)."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_RECOMPILES)
    return torch.compile(_attend, fullgraph=True)


def _block_indices(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the number of marked blocks in each row, int32 (B, 1, N), and the row's indices, marked first, int32 (B, 1, N, N)."""
    marked_B1NN = blocks_BNN.unsqueeze(1).int().contiguous()  # the kernel assumes stride 1 in the last dimension
    return marked_B1NN.sum(-1, dtype=torch.int32), marked_B1NN.argsort(dim=-1, descending=True, stable=True).int()


def _mask_mod(first: int, window: int | None, documents_BS: Tensor | None) -> Callable[..., Tensor]:
    """`first`: the position of the first query."""

    def mask_mod(sequence: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if first:
            query = query + first
        visible = key <= query
        if window is not None:
            visible = visible & (query - key < window)
        if documents_BS is not None:
            visible = visible & (documents_BS[sequence, query] == documents_BS[sequence, key])
        return visible

    return mask_mod


def _score_mod(cap: float) -> Callable[..., Tensor]:
    def score_mod(logit: Tensor, _sequence: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return apply_softcap(logit, cap)

    return score_mod
