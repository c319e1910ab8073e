"""Tensor parallelism with sequence parallelism between the blocks (Megatron-LM; Korthikanti et al. 2022).

Between the sublayers every tensor rank holds a slice of each sequence. Attention and dense feed-forwards gather the sequence,
compute their own heads or hidden columns, and reduce-scatter the sum. Norms, routers and shared experts work on the slice, with
weights that are whole on every rank; so does the MoE layer, which routes each token on one rank.

For a weight that is whole on every rank, a rank computes the gradient of its slice of the sequence, or of its heads (norms of heads
and latents); the gradient is the sum over the ranks.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.attention import Attention, LatentAttention
from ..moe.delta_net import DeltaNet
from ..moe.dispatch import Choices, FusedDispatcher, LocalDispatcher
from ..moe.dropout import Dropout
from ..moe.linear import HeadsNorm
from ..moe.model import Transformer
from ..moe.token_info import TokenInfo
from .collectives import all_reduce_parts, gather_sequence, scatter_sequence, stack_over
from .dispatch.all_to_all import plan_expert_order, read_splits, reorder
from .dispatch.async_collectives import AllToAll
from .layout import sliced_dim, sliced_dim_of_experts
from .mesh import Axis, Mesh, Place
from .shard import ShardMetadata
from .vocabulary import VocabularyParallelEmbedding


def apply_tensor_parallel(model: Transformer, mesh: Mesh, shards: dict[str, ShardMetadata]) -> None:
    """Slices the weights and registers the gathers and scatters as hooks of the modules. Updates `shards`."""
    axis = mesh.tensor
    for name, _ in list(model.named_parameters()):
        dim = sliced_dim(name, model.config)
        if dim is not None:
            slice_parameter(model, name, dim, axis, shards)
    if "embedding.weight" in shards:  # not every stage of a pipeline has embedding and head
        weight_VD = model.get_parameter("embedding.weight")
        model.embedding = VocabularyParallelEmbedding(weight_VD, shards["embedding.weight"].offsets[0], axis)
    if "norm.weight" in shards:
        if model.config.tie_embeddings:
            model.head.owner = (model.embedding,)
        model.head.register_forward_pre_hook(_gather_input(axis))
    _slice_keys(axis, model.embedding_dropout, model.output_dropout)
    for block in model.blocks:
        _parallelize_attention(block.attention, axis)
        _slice_keys(axis, block.attention_dropout, block.feedforward_dropout)
        if block.dense is not None:
            block.dense.register_forward_pre_hook(_gather_input(axis))
            block.dense.register_forward_hook(_scatter_output(axis))
            block.dense.dropout.first_column = axis.rank * block.dense.down.shape[1]
        if block.moe is not None:
            block.moe.register_forward_pre_hook(_slice_tokens(axis))


def _parallelize_attention(attention: Attention | LatentAttention | DeltaNet, axis: Axis) -> None:
    """Latents are projected from the slice and then gathered, since they are smaller than the input."""
    if isinstance(attention, DeltaNet):
        attention.register_forward_pre_hook(_gather_input(axis))
    elif isinstance(attention, Attention):
        attention.register_forward_pre_hook(_gather_input(axis))
        for norm in (attention.q_norm, attention.k_norm):
            if isinstance(norm, HeadsNorm):
                norm.all_reduce = functools.partial(all_reduce_parts, axis=axis)
    else:
        attention.kv_down.register_forward_hook(_gather_output(axis))
        if attention.widths.q_rank is None:
            attention.q.register_forward_pre_hook(_gather_input(axis))
        else:
            attention.q_down.register_forward_hook(_gather_output(axis))
    attention.o.adds_bias = axis.rank == 0
    attention.register_forward_hook(_scatter_output(axis))


def slice_parameter(model: nn.Module, name: str, dim: int, axis: Axis | Place, shards: dict[str, ShardMetadata]) -> None:
    """Replaces the parameter `name` by this rank's even chunk of it in dimension `dim`, and updates its entry in `shards`."""
    assert shards[name].sizes[dim] % axis.size == 0, f"{name}: {shards[name]} does not divide by {axis.size} in dimension {dim}"
    path, _, attribute = name.rpartition(".")
    chunk = model.get_parameter(name).detach().chunk(axis.size, dim)[axis.rank].contiguous()
    setattr(model.get_submodule(path), attribute, nn.Parameter(chunk))
    shards[name] = shards[name].chunk(dim, axis.size, axis.rank)


def _gather_input(axis: Axis) -> Any:
    return lambda _module, inputs: (gather_sequence(inputs[0], axis), *inputs[1:])


def _gather_output(axis: Axis) -> Any:
    return lambda _module, _inputs, output: gather_sequence(output, axis)


def _scatter_output(axis: Axis) -> Any:
    return lambda _module, _inputs, output: scatter_sequence(output, axis)


def _slice_tokens(axis: Axis) -> Any:
    """Returns a hook for the MoE layer, which receives a slice of x_BSD: takes the same slice of the information of all tokens."""

    def hook(_module: nn.Module, inputs: tuple[Tensor, TokenInfo]) -> tuple[Tensor, TokenInfo]:
        x_BSD, tokens = inputs
        sliced = (_slice_of(whole_BS, axis) for whole_BS in (tokens.valid_BS, tokens.ids_BS, tokens.keys_BS))
        return x_BSD, TokenInfo(*sliced, step=tokens.step, layer=tokens.layer)

    return hook


def _slice_keys(axis: Axis, *dropouts: Dropout) -> None:
    """Gives the dropout of slices of x_BSD the same slice of the keys of all tokens."""
    for dropout in dropouts:
        dropout.register_forward_pre_hook(lambda _module, inputs: (inputs[0], _slice_of(inputs[1], axis)))


def _slice_of(whole_BS: Tensor | None, axis: Axis) -> Tensor | None:
    return None if whole_BS is None else whole_BS.chunk(axis.size, dim=1)[axis.rank]


# Expert tensor parallelism: the ranks of an expert_tensor group hold the same experts, each some of their hidden columns.
#
# The ranks route different tokens (parallel folding). So each rank sends its rows to the whole group, computes its part of all
# rows, and sums the parts of its own rows. This wraps the experts, and works with any dispatcher.
# N ranks of the group, E experts of a rank, R rows of this rank, A rows of all ranks.


def apply_expert_tensor_parallel(model: Transformer, mesh: Mesh, shards: dict[str, ShardMetadata], narrow: bool) -> None:
    """Slices the experts' hidden columns and exchanges rows around their computation. Updates `shards`.

    `narrow`: the rows of tokens travel in e4m3.
    """
    axis = mesh.axis("expert_tensor")
    for name, _ in list(model.named_parameters()):
        dim = sliced_dim_of_experts(name)
        if dim is not None:
            slice_parameter(model, name, dim, axis, shards)
    for block in model.blocks:
        if block.moe is not None:
            experts = block.moe.experts
            experts.adds_bias = experts.adds_bias and axis.rank == 0
            experts.dropout.first_column = axis.rank * experts.down.shape[2]
            experts.output_is_sent = True
            if isinstance(block.moe.dispatcher, FusedDispatcher):
                block.moe.dispatcher = LocalDispatcher(model.config.moe.experts)  # exchanging rows needs rows
            experts.forward = functools.partial(share_rows, experts.forward, axis, narrow)


def share_rows(
    experts: Callable[..., Tensor],
    axis: Axis,
    narrow: bool,
    x: Tensor,
    counts_E: Tensor,
    choices: Choices | None = None,
    keys_R: Tensor | None = None,
) -> Tensor:
    """Computes the rows of all ranks with this rank's part of `experts`, and sums the parts: rows (R, D) to (R, D).

    Rows are gathered and scattered by all-to-alls, since ranks have different numbers of rows; each is the other's gradient.
    """
    assert choices is None, "rows are shared, and tokens have none yet"
    received_NE = stack_over(counts_E, axis)
    send_N, receive_N = read_splits(counts_E.expand_as(received_NE), received_NE, axis.size * len(x))
    behind = len(x) - send_N[0]
    if behind:  # rows of the symmetric exchange that no token fills
        x, keys_R = x[: send_N[0]], None if keys_R is None else keys_R[: send_N[0]]
    route = AllToAll(send_N, receive_N, axis)
    pending = route.start(x.expand(axis.size, -1, -1).flatten(0, 1), narrow=narrow)
    keys = None if keys_R is None else route.start(keys_R.repeat(axis.size))
    order_A, inverse_A = plan_expert_order(received_NE, sum(receive_N))
    keys_A = None if keys is None else keys.wait().index_select(0, order_A)
    part_AD = experts(reorder(pending.wait(), order_A, inverse_A), received_NE.sum(0), keys_R=keys_A)
    pending = AllToAll(receive_N, send_N, axis).start(reorder(part_AD, inverse_A, order_A))
    y_RD = pending.wait().view(axis.size, *x.shape).sum(0)
    return F.pad(y_RD, (0, 0, 0, behind)) if behind else y_RD
