"""The one place where a model is changed for a parallel layout, one transformation after the other, each with a log line."""

import functools
import logging
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ..moe import init
from ..moe.config import ModelConfig
from ..moe.dispatch import Dispatcher
from ..moe.model import Transformer
from ..moe.recompute import selective_contexts
from .communicators import Grouping, all_used, grouping, replicated
from .compile_blocks import compile_blocks
from .config import Exchange, ExchangeDtype, Overflow, ParallelConfig, Recompute
from .context import apply_context_parallel
from .dispatch.all_gather import AllGatherDispatcher
from .dispatch.all_to_all import AllToAllDispatcher
from .dispatch.base import ExpertParallelDispatcher
from .dispatch.deduplicated import DeduplicatedDispatcher, node_axes
from .dispatch.deepep import DeepEPDispatcher
from .dispatch.symmetric import SymmetricDispatcher
from .fsdp import apply_fsdp, attributes_of_pass
from .layout import members, node_ranks, shard_dim
from .mesh import Axis, Mesh
from .offload import Offload
from .pipeline.overlap import Overlap
from .pipeline.p2p import Links
from .pipeline.run import Pipeline
from .pipeline.stage_model import cut_model
from .scopes import DistributedScope
from .shard import ShardMetadata, whole
from .tensor import apply_expert_tensor_parallel, apply_tensor_parallel, slice_parameter

log = logging.getLogger("tokenyard")


def build_dispatcher(experts: int, mesh: Mesh, config: ParallelConfig) -> Dispatcher:
    """Returns the dispatcher that `config.exchange` names.

    It has no state from one call to the next, so all layers share it. `experts`: of a layer, on all ranks.
    """
    dispatcher = _dispatcher_of(experts, mesh, config)
    if isinstance(dispatcher, ExpertParallelDispatcher):
        dispatcher.narrow = config.exchange_dtype is ExchangeDtype.fp8
    return dispatcher


def _dispatcher_of(experts: int, mesh: Mesh, config: ParallelConfig) -> Dispatcher:
    chunks = config.overlap_chunks
    if config.exchange is Exchange.hierarchical:
        local = node_ranks(config, mesh.world, os.environ.get("LOCAL_WORLD_SIZE"))
        return DeduplicatedDispatcher(experts, node_axes(mesh, local), chunks)
    axis = mesh.axis("expert")
    match config.exchange:
        case Exchange.plain:
            return AllToAllDispatcher(experts, axis, chunks)
        case Exchange.deduplicated:
            return DeduplicatedDispatcher(experts, [axis], chunks)
        case Exchange.gather:
            return AllGatherDispatcher(experts, axis, chunks)
        case Exchange.deepep:
            return DeepEPDispatcher(experts, axis, chunks)
        case Exchange.symmetric:
            return SymmetricDispatcher(experts, axis, config.exchange_rows, config.exchange_overflow is Overflow.repair)


@dataclass
class ShardedParameter:
    """A parameter of this rank."""

    parameter: nn.Parameter
    metadata: ShardMetadata
    """Which shard of the global tensor it is."""
    replicas: Axis
    """The ranks that hold the same shard, over which its gradient is summed."""
    gradient_dtype: torch.dtype | None = None
    """Of its gradient; None: that of the parameter."""


@dataclass
class Parallel:
    """A model on this rank, with the shard that it holds of each parameter."""

    model: Transformer
    mesh: Mesh
    device: torch.device
    parameters: dict[str, ShardedParameter] = field(default_factory=dict)
    zero: int = 3
    """What FSDP2 keeps whole within a step: `ParallelConfig.zero`."""
    recompute: bool = False
    """Whether the backward pass computes blocks again, so that nothing of theirs is kept, casts of weights neither."""
    pipeline: Pipeline | None = None
    """This rank's stages, if the layers are cut into several."""
    overflow: Overflow | None = None
    """What happens to choices that the exchange has no room for; None if it has room for all."""


def parallelize(model: Transformer, mesh: Mesh, config: ParallelConfig, device: torch.device, compiled: bool = False) -> Parallel:
    """Distributes a model that was built on the meta device. Its weights are uninitialised on `device`: see `initialise`."""
    shared = create_axes(model.config, config, mesh, node_ranks(config, mesh.world, os.environ.get("LOCAL_WORLD_SIZE")))
    pipeline = None
    if config.pipeline > 1:
        pipeline = cut_model(model, mesh, config, Links(mesh, config, shared.links_on_world, shared.links_together))
        log.info("pipeline: %d stages on %d ranks, schedule %s", pipeline.stages, pipeline.ranks, pipeline.kind.value)
    shards = {name: whole(parameter.shape) for name, parameter in model.named_parameters()}
    if mesh.stage.size > 1:
        for block in model.blocks:
            if block.moe is not None:
                block.moe.router.scopes = DistributedScope(mesh)
    if config.tensor > 1:
        apply_tensor_parallel(model, mesh, shards)
        log.info("tensor parallel: %d ranks share dense weights and sequences", config.tensor)
    if config.context > 1:
        apply_context_parallel(model, mesh, config.context_exchange)
        log.info("context parallel: %d ranks share sequences, %s exchange", config.context, config.context_exchange.value)
    if config.exchange_dtype is ExchangeDtype.fp8:
        for block in model.blocks:
            if block.moe is not None:
                block.moe.rounds_tokens = True
        log.info("experts take tokens that are rounded to e4m3, in which they travel")
    if config.expert > 1:
        _apply_expert_parallel(model, mesh, shards, config)
        log.info("expert parallel: %d ranks share the experts, %s exchange", config.expert, config.exchange.value)
    # Before recomputation wraps blocks, and slices of experts wrap experts.
    one_graph = compiled and compile_blocks(model, config, mesh.stage.size, device)
    if config.expert_tensor > 1:
        apply_expert_tensor_parallel(model, mesh, shards, config.exchange_dtype is ExchangeDtype.fp8)
        log.info("expert tensor parallel: %d ranks share each expert's hidden columns", config.expert_tensor)
    if config.recompute is Recompute.offload:
        offload = Offload(device)
        for block in model.blocks:
            offload.wrap(block)
        log.info("activations of all but two blocks are kept in the memory of the host, and return in the backward pass")
    elif config.recompute is not Recompute.none:
        _recompute_blocks(model, config.recompute)
        log.info("activation checkpointing, %s: every block is computed again in the backward pass", config.recompute.value)
    if config.shard > 1:
        apply_fsdp(model, mesh, device, config.zero, None if pipeline is None else pipeline.layers, one_graph)
        log.info("FSDP2, as ZeRO-%d: %d ranks shard each dense parameter", config.zero, config.shard)
    model.to_empty(device=device)
    parameters = {name: _sharded(name, parameter, mesh, shards[name], model.config) for name, parameter in model.named_parameters()}
    if pipeline is not None:
        if config.pipeline_overlap:
            pipeline.overlap = Overlap(device, attributes_of_pass(model))
        for name in pipeline.copied:
            _copy_on_ends(parameters.get(name), mesh, fsdp=config.shard > 1)
    overflow = config.exchange_overflow if config.expert > 1 and config.exchange is Exchange.symmetric else None
    return Parallel(model, mesh, device, parameters, config.zero, config.recompute.repeats, pipeline, overflow)


def create_axes(model: ModelConfig, config: ParallelConfig, mesh: Mesh, node: int) -> Grouping:
    """Creates the process groups of all axes that any stage uses, and says which have none. Collective. `node`: ranks of a node."""
    found = grouping(model, config, mesh.world, node)
    mesh.by_messages |= {members(mesh.rank, dims) for dims in found.by_messages}
    for use in all_used(model, config, mesh.world, node):
        if use.hop:
            mesh.strided(use.hop)
        else:
            (mesh.sums if use.sums else mesh.axis)(*use.names)
    return found


def initialise(parallel: Parallel, seed: int) -> None:
    """Fills this rank's weights with its shards of the weights that one device has with the same seed, and draws no others."""
    for name, sharded in parallel.parameters.items():
        shard = sharded.metadata
        init.fill(local(sharded.parameter.data), name, shard.shape, parallel.model.config, seed, shard.offsets)
    init.reset_expert_biases(parallel.model)


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a tensor that FSDP may have sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_of(sharded: ShardedParameter) -> Tensor:
    """Returns this rank's gradient of a parameter; zeros, which it then has, if no token used it."""
    if sharded.parameter.grad is None:
        sharded.parameter.grad = torch.zeros_like(sharded.parameter, dtype=sharded.gradient_dtype)
    return local(sharded.parameter.grad)


def _apply_expert_parallel(model: Transformer, mesh: Mesh, shards: dict[str, ShardMetadata], config: ParallelConfig) -> None:
    axis = mesh.place("expert")
    dispatcher = build_dispatcher(model.config.moe.experts, mesh, config)
    for name, _ in list(model.named_parameters()):
        if ".experts." in name:
            slice_parameter(model, name, 0, axis, shards)
    for block in model.blocks:
        if block.moe is not None:
            block.moe.dispatcher = dispatcher
            block.moe.experts.first_expert = axis.rank * len(block.moe.experts.down)
            block.moe.experts.output_is_sent = config.exchange is Exchange.plain  # the others weight it before they send it


def _copy_on_ends(sharded: ShardedParameter | None, mesh: Mesh, fsdp: bool) -> None:
    """Makes the first and the last stage replicas of the embedding, whose rows tensor parallelism slices. Collective."""
    replicas = mesh.ends("replicate") if fsdp else mesh.ends("replicate", "shard", "context")
    if sharded is not None:
        sharded.replicas = replicas


def _recompute_blocks(model: Transformer, recompute: Recompute) -> None:
    """Wraps the blocks. The backward pass computes a block again when it comes to it."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute is Recompute.selective:
        settings["context_fn"] = functools.partial(selective_contexts, model.config.width)
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, **settings)


def _sharded(name: str, parameter: nn.Parameter, mesh: Mesh, shard: ShardMetadata, config: ModelConfig) -> ShardedParameter:
    """`shard` is this rank's before FSDP. Ranks are replicas if FSDP, tensor and expert (tensor) parallelism give them the same."""
    by_fsdp = isinstance(parameter, DTensor)
    if by_fsdp:
        axis = mesh.place("expert_shard") if ".experts." in name else mesh.place("shard", "context")
        shard = shard.chunk(shard_dim(shard.sizes, axis.size), axis.size, axis.rank)
    assert tuple(local(parameter).shape) == shard.sizes, f"{name} is {tuple(local(parameter).shape)}, not {shard.sizes}"
    return ShardedParameter(parameter, shard, mesh.sums(*replicated(name, by_fsdp, config)))
