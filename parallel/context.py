"""Context parallelism: each rank of a context axis has two chunks of each sequence, through all of the model.

A sequence has 2 N chunks for N ranks. Rank r has chunks r and 2 N - 1 - r (zigzag; Llama 3, section 3.3.2): an early and a late
one, so that all ranks attend to as many tokens. Only attention and what is counted over a sequence look beyond a rank's own tokens.
Ids, targets and documents stay whole on every rank. With tensor parallelism, a rank's tokens are then sliced over the tensor ranks.

B sequences, S tokens of each, s = S / N of this rank, H query heads, G key-value heads, h width of a head, v width of a value.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..moe.attention import KeyValueCache, attend
from ..moe.config import ModelConfig
from ..moe.delta_net import DeltaNet
from ..moe.dropout import Dropout
from ..moe.flexible_attention import block_masks
from ..moe.model import Transformer
from ..moe.rotary import RotaryTables, rotary_tables
from ..moe.softmax import Softmax
from ..moe.token_info import TokenInfo
from .collectives import gather_sequence, swap_parts
from .config import ContextExchange
from .mesh import Axis, Mesh

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask  # imports the compiler, which takes a second


def apply_context_parallel(model: Transformer, mesh: Mesh, exchange: ContextExchange) -> None:
    """Cuts what enters the model, and gives attention the keys and values of the other ranks. Changes no weight."""
    axis, gathers = mesh.context, exchange is ContextExchange.gather
    if "embedding" in dict(model.named_children()):  # not every stage of a pipeline has it
        model.embedding.register_forward_pre_hook(lambda _module, inputs: (own_chunks(inputs[0], axis),))
    model.rotary_tables = partial(_own_tables, axis)
    if gathers:
        model.block_masks = partial(_masks_of_chunks, axis)
    keys = GatheredKeys(axis)
    for block in model.blocks:
        assert not isinstance(block.attention, DeltaNet), "refused: its state passes through all earlier tokens"
        block.attention.attend = partial(attend_in_chunks if gathers else attend_by_heads, axis)
        if gathers:
            block.attention.register_forward_pre_hook(lambda _module, inputs: (*inputs[:2], keys))
        if block.moe is not None:
            block.moe.register_forward_pre_hook(_own_tokens(axis), prepend=True)  # before tensor ranks slice them
    for name, module in model.named_modules():
        if isinstance(module, Dropout) and ".moe." not in name:
            module.register_forward_pre_hook(lambda _module, inputs: (inputs[0], _own_keys(inputs[1], axis)), prepend=True)


def own_runs(length: int, axis: Axis) -> list[range]:
    """Returns the positions of this rank's two chunks in a sequence of `length` tokens."""
    size = length // (2 * axis.size)
    return [range(chunk * size, (chunk + 1) * size) for chunk in _chunks(axis, axis.rank)]


def own_chunks(x: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """Returns this rank's chunks of whole sequences, along `dim`."""
    chunks = x.chunk(2 * axis.size, dim)
    return torch.cat([chunks[chunk] for chunk in _chunks(axis, axis.rank)], dim)


def in_order(x: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """Puts sequences in the order of their tokens that have been gathered from one rank after the other, along `dim`."""
    chunks, last = x.chunk(2 * axis.size, dim), 2 * axis.size - 1
    places = [2 * chunk if chunk < axis.size else 2 * (last - chunk) + 1 for chunk in range(last + 1)]
    return torch.cat([chunks[place] for place in places], dim)


def by_rank(x: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """The inverse of `in_order`."""
    chunks = x.chunk(2 * axis.size, dim)
    return torch.cat([chunks[chunk] for rank in range(axis.size) for chunk in _chunks(axis, rank)], dim)


def _chunks(axis: Axis, rank: int) -> tuple[int, int]:
    return rank, 2 * axis.size - 1 - rank


def _own_keys(keys_BS: Tensor | None, axis: Axis) -> Tensor | None:
    return None if keys_BS is None else own_chunks(keys_BS, axis)


def _own_tables(
    axis: Axis, config: ModelConfig, start: int, length: int, device: torch.device, dtype: torch.dtype, documents_BS: Tensor | None
) -> RotaryTables:
    """Returns the rotary tables of this rank's tokens, by their positions in the whole sequence or document."""
    tables = rotary_tables(config, start, length, device, dtype, documents_BS)
    return tables._replace(cos=own_chunks(tables.cos, axis, -2), sin=own_chunks(tables.sin, axis, -2))


def _masks_of_chunks(
    axis: Axis, config: ModelConfig, ids_BS: Tensor, dtype: torch.dtype, documents_BS: Tensor | None
) -> dict[bool, list["BlockMask"]]:
    """Returns the masks of this rank's two chunks, by kind of layer."""
    chunks = [block_masks(config, ids_BS, dtype, documents_BS, run) for run in own_runs(ids_BS.shape[1], axis)]
    return {windowed: [masks[windowed] for masks in chunks] for windowed in chunks[0]}


def _own_tokens(axis: Axis) -> Any:
    """Returns a hook for the MoE layer: takes this rank's chunks of the information of all tokens."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, TokenInfo]) -> tuple[Tensor, TokenInfo]:
        x_BSD, tokens = inputs
        own = (None if x is None else own_chunks(x, axis) for x in (tokens.valid_BS, tokens.ids_BS, tokens.keys_BS))
        return x_BSD, TokenInfo(*own, step=tokens.step, layer=tokens.layer)

    return hook


class GatheredKeys(KeyValueCache):
    """Stands where a cache of earlier tokens stands, and adds the tokens of the other ranks. MLA passes its latents."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis

    def extend(self, keys_BGSh: Tensor, values_BGSh: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of whole sequences, in one all-gather. The gradients are summed over the ranks."""
        mine = [x.transpose(1, 2).flatten(2) for x in (keys_BGSh, values_BGSh)]
        whole_BSC = in_order(gather_sequence(torch.cat(mine, dim=-1), self.axis), self.axis)
        heads, widths = keys_BGSh.shape[1], [x.shape[-1] for x in mine]
        keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in whole_BSC.split(widths, dim=-1))
        return keys, values


def attend_in_chunks(
    axis: Axis,
    q_BHsh: Tensor,
    k_BGSh: Tensor,
    v_BGSv: Tensor,
    softmax: Softmax,
    sinks_H: Tensor | None = None,
    documents_BS: Tensor | None = None,
    blocks: "Sequence[BlockMask] | None" = None,
) -> Tensor:
    """Returns (B, H, s, v): each chunk of queries attends to the keys up to its end, in the window.

    `blocks`: the masks of the two chunks.
    """
    parts = []
    for index, (run, q_BHch) in enumerate(zip(own_runs(k_BGSh.shape[2], axis), q_BHsh.chunk(2, dim=2), strict=True)):
        mask = None if blocks is None else blocks[index]
        first = 0 if mask is not None or softmax.window is None else max(0, run.start - softmax.window + 1)
        keys = slice(first, run.stop)
        documents = None if documents_BS is None else documents_BS[:, keys]
        parts.append(attend(q_BHch, k_BGSh[:, :, keys], v_BGSv[:, :, keys], softmax, sinks_H, documents, mask))
    return torch.cat(parts, dim=2)


def attend_by_heads(
    axis: Axis,
    q_BHsh: Tensor,
    k_BGsh: Tensor,
    v_BGsv: Tensor,
    softmax: Softmax,
    sinks_H: Tensor | None = None,
    documents_BS: Tensor | None = None,
    blocks: "BlockMask | None" = None,
) -> Tensor:
    """Returns (B, H, s, v): each rank attends with 1 / N of the heads to whole sequences (DeepSpeed Ulysses, Jacobs et al. 2023).

    Key-value heads of which there are too few for all ranks are repeated.
    """
    heads = k_BGsh.shape[1]
    if repeats := math.lcm(heads, axis.size) // heads - 1:
        k_BGsh, v_BGsv = (x.repeat_interleave(repeats + 1, dim=1) for x in (k_BGsh, v_BGsv))
    # Of all heads of one rank's tokens: (N, B, s, own heads x width) in the order of the ranks that they go to.
    sent = [x.unflatten(1, (axis.size, -1)).permute(1, 0, 3, 2, 4) for x in (q_BHsh, k_BGsh, v_BGsv)]
    came_NBsC = swap_parts(torch.cat([x.flatten(3) for x in sent], dim=-1), axis)
    whole_BSC = in_order(came_NBsC.transpose(0, 1).flatten(1, 2), axis)
    parts = whole_BSC.split([x.shape[3] * x.shape[4] for x in sent], dim=-1)
    q_BHSh, k_BGSh, v_BGSv = (part.unflatten(-1, (x.shape[3], -1)).transpose(1, 2) for part, x in zip(parts, sent, strict=True))
    sinks = None if sinks_H is None else sinks_H.chunk(axis.size)[axis.rank]
    if softmax.largest_H is not None:
        softmax = softmax._replace(largest_H=softmax.largest_H.chunk(axis.size)[axis.rank])
    y_BHSv = attend(q_BHSh, k_BGSh, v_BGSv, softmax, sinks, documents_BS, blocks)
    y_NBsC = by_rank(y_BHSv.transpose(1, 2).flatten(2), axis).unflatten(1, (axis.size, -1)).transpose(0, 1)
    return swap_parts(y_NBsC, axis).unflatten(-1, (y_BHSv.shape[1], -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
