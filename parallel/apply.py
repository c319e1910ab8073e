"""The one place where a model is changed for a layout: in one visible order, one log line each."""

import functools
import logging
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..moe import init
from ..moe.config import ModelConfig
from ..moe.model import Transformer
from .config import Exchange, ParallelConfig
from .dispatch.all_gather import GatherDispatcher
from .dispatch.all_to_all import PlainDispatcher
from .dispatch.base import ExchangingDispatcher
from .dispatch.deduplicated import DeduplicatedDispatcher, hierarchical_dispatcher
from .fsdp import apply_fsdp
from .layout import node_ranks, shard_dim, sliced_dim, sliced_dim_of_experts
from .mesh import Axis, Mesh
from .scopes import DistributedScope
from .shard import ShardMetadata, whole
from .tensor import apply_expert_tensor_parallel, apply_tensor_parallel, narrowed, replace_parameter

# The exchange that the configuration asks for.


def build_dispatcher(experts: int, mesh: Mesh, config: ParallelConfig) -> ExchangingDispatcher:
    """One for all layers: it has no state. `experts` are those of a layer on all ranks."""
    axis, chunks = mesh.axis("expert"), config.overlap_chunks
    match config.exchange:
        case Exchange.plain:
            return PlainDispatcher(experts, axis, chunks)
        case Exchange.deduplicated:
            return DeduplicatedDispatcher(experts, [axis], chunks)
        case Exchange.hierarchical:
            local = node_ranks(config, mesh.world, os.environ.get("LOCAL_WORLD_SIZE"))
            return hierarchical_dispatcher(experts, mesh, local, chunks)
        case Exchange.gather:
            return GatherDispatcher(experts, axis, chunks)


log = logging.getLogger("tokenyard")


@dataclass
class ShardedParameter:
    """One parameter on this rank: which piece of the global tensor it is, and the ranks that hold the same piece."""

    parameter: nn.Parameter
    piece: ShardMetadata
    copies: Axis


@dataclass
class Parallel:
    """A model on this rank, and where each of its parameters is."""

    model: Transformer
    mesh: Mesh
    device: torch.device
    placed: dict[str, ShardedParameter] = field(default_factory=dict)
    zero: int = 3
    """What FSDP2 keeps whole within a step, see parallel/config.py."""


def parallelize(model: Transformer, mesh: Mesh, config: ParallelConfig, device: torch.device, compiled: bool = False) -> Parallel:
    """Spread a model that was built on the meta device; its weights are then empty on `device` (see `initialise`)."""
    pieces = {name: whole(parameter.shape) for name, parameter in model.named_parameters()}
    if mesh.world > 1:
        _set_surroundings(model, mesh)
    if config.tensor > 1:
        apply_tensor_parallel(model, mesh, pieces)
        log.info("tensor parallel: %d ranks share dense weights and sequences", config.tensor)
    if config.expert > 1:
        _apply_expert_parallel(model, mesh, pieces, config)
        log.info("expert parallel: %d ranks share the experts, %s exchange", config.expert, config.exchange.value)
    if config.expert_tensor > 1:
        apply_expert_tensor_parallel(model, mesh, pieces)
        log.info("expert tensor parallel: %d ranks share each expert's hidden columns", config.expert_tensor)
    if config.recompute:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        log.info("activation checkpointing: every block is computed again in the backward pass")
    if compiled:
        _compile(model)
        log.info("torch.compile: attention, norms and dense feed-forwards of every block")
    if mesh.sizes["shard"] > 1:
        apply_fsdp(model, mesh, device, config.zero)
        log.info("FSDP2, as ZeRO-%d: %d ranks shard each dense parameter", config.zero, mesh.sizes["shard"])
    model.to_empty(device=device)
    return Parallel(model, mesh, device, _place(model, mesh, pieces), config.zero)


def initialise(parallel: Parallel, seed: int) -> None:
    """Fill this rank's weights: those of one device with the same seed, cut to its pieces."""
    for name, placed in parallel.placed.items():
        piece = placed.piece
        target = local(placed.parameter.data)
        if not target.numel():
            continue
        experts = range(piece.offsets[0], piece.offsets[0] + piece.sizes[0])
        init.fill(target, name, piece.shape, parallel.model.config, seed, _cutter(piece), experts)
    init.reset_expert_biases(parallel.model)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that FSDP may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _set_surroundings(model: Transformer, mesh: Mesh) -> None:
    for block in model.blocks:
        if block.moe is not None:
            block.moe.router.surroundings = DistributedScope(mesh)


def _apply_expert_parallel(model: Transformer, mesh: Mesh, pieces: dict[str, ShardMetadata], config: ParallelConfig) -> None:
    axis = mesh.axis("expert")
    dispatcher = build_dispatcher(model.config.moe.experts, mesh, config)
    for name, parameter in list(model.named_parameters()):
        if ".experts." in name:
            replace_parameter(model, name, parameter.chunk(axis.size)[axis.rank].contiguous())
            pieces[name] = narrowed(pieces[name], 0, axis)
    for block in model.blocks:
        if block.moe is not None:
            block.moe.dispatcher = dispatcher


def _compile(model: Transformer) -> None:
    """Routing and dispatch stay outside: their shapes and splits are known only when the tokens are."""
    for block in model.blocks:
        norms = (block.attention_norm, block.attention_post_norm, block.feedforward_norm, block.feedforward_post_norm)
        for module in (block.attention, *norms, block.dense):
            if module is not None:
                module.compile()


def _place(model: Transformer, mesh: Mesh, pieces: dict[str, ShardMetadata]) -> dict[str, ShardedParameter]:
    return {name: _place_one(name, parameter, mesh, pieces[name], model.config) for name, parameter in model.named_parameters()}


def _place_one(name: str, parameter: nn.Parameter, mesh: Mesh, piece: ShardMetadata, config: ModelConfig) -> ShardedParameter:
    """A piece is copied by every rank that neither FSDP, nor tensor, nor expert (tensor) parallelism tells apart."""
    kind = "expert_" if ".experts." in name else ""
    sharded = isinstance(parameter, DTensor)
    if sharded:
        piece = _shard(piece, mesh.axis(kind + "shard"))
    names = [kind + "replicate"]
    if not sharded:
        names.append(kind + "shard")
    if (sliced_dim_of_experts(name) if kind else sliced_dim(name, config)) is None:
        names.append(kind + "tensor")
    assert tuple(local(parameter).shape) == piece.sizes, f"{name} is {tuple(local(parameter).shape)}, not {piece.sizes}"
    return ShardedParameter(parameter, piece, mesh.axis(*names))


def _shard(piece: ShardMetadata, axis: Axis) -> ShardMetadata:
    """FSDP's share: even chunks of the size rounded up, so the last ranks may have less or nothing."""
    dim = shard_dim(piece.sizes, axis.size)
    size = -(-piece.sizes[dim] // axis.size)
    start = min(axis.rank * size, piece.sizes[dim])
    offsets, sizes = list(piece.offsets), list(piece.sizes)
    offsets[dim], sizes[dim] = offsets[dim] + start, min(size, piece.sizes[dim] - start)
    return ShardMetadata(piece.shape, tuple(offsets), tuple(sizes))


def _cutter(piece: ShardMetadata):
    def cut(whole_tensor: Tensor, first: int) -> Tensor:
        return ShardMetadata(piece.shape[first:], piece.offsets[first:], piece.sizes[first:]).cut(whole_tensor)

    return cut
