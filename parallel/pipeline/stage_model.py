"""A model on one rank of a pipeline: the layers of its stages. The others are deleted; the names of the rest do not change."""

import functools
from typing import Any

import torch
from torch import Tensor

from ...moe.config import ModelConfig
from ...moe.model import HeadLoss, Transformer
from ...moe.router import RoutingStats
from ...moe.token_info import BatchPosition, build_token_info
from ..config import ParallelConfig
from ..mesh import Mesh
from .p2p import Links, StageMessage
from .run import Pipeline
from .stages import copies_embedding, cut_layers, has_embedding, layers_on


def cut_model(model: Transformer, mesh: Mesh, parallel: ParallelConfig, links: Links) -> Pipeline:
    """Deletes what other ranks of the pipeline have, and replaces `forward` by `stage_forward`."""
    config, cut, ranks = model.config, cut_layers(model.config, parallel), parallel.pipeline
    rank = mesh.rank // (mesh.world // ranks)
    layers = layers_on(cut, parallel, rank)
    first, last = 0 in layers, len(cut) - 1 in layers
    for name in list(model.layers):
        if not any(int(name) in inside for inside in layers.values()):
            del model.layers[name]
    if not last:
        del model.norm, model.head
        model.mtp.clear()
    if not has_embedding(config, first, last):
        del model.embedding
    routing = [index for index in range(config.layers + config.mtp_depth) if config.moe_layer(index)]
    rows = {stage: [routing.index(layer) for layer in inside if layer in routing] for stage, inside in layers.items()}
    if last:
        rows[len(cut) - 1] += [row for row, layer in enumerate(routing) if layer >= config.layers]
    copied = {"embedding.weight"} if copies_embedding(config, parallel) else set[str]()
    forward: Any = functools.partial(stage_forward, model, layers, len(cut) - 1)
    model.forward = forward
    predicting = sum(layer >= config.layers for layer in routing)
    return Pipeline(parallel.pipeline_schedule, ranks, rank, layers, len(cut), rows, len(routing), predicting, copied, links)


def stage_forward(
    model: Transformer,
    layers: dict[int, range],
    last: int,
    ids_BS: Tensor,
    valid_BS: Tensor | None,
    stage: int,
    received: StageMessage | None,
    head_losses: list[HeadLoss],
    position: BatchPosition | None = None,
    documents_BS: Tensor | None = None,
) -> tuple[StageMessage, list[Tensor], list[RoutingStats]]:
    """Runs one of this rank's stages (`layers`, by stage): `Transformer.forward` from what it `received` (None: the embedding) on.

    Returns what the next stage takes, the stage's losses (of the stage `last` only), and the statistics of its MoE layers.
    """
    config = model.config
    tokens = build_token_info(ids_BS, valid_BS, (position or BatchPosition()) if model.training else None, model.is_random)
    rotary = model.rotary_tables(config, 0, ids_BS.shape[1], ids_BS.device, model.activations, documents_BS)
    rotary = rotary._replace(blocks=model.block_masks(config, ids_BS, model.activations, documents_BS))
    stream, earlier_BSD, _ = StageMessage(model.embed(ids_BS, tokens)) if received is None else received
    stats: list[RoutingStats] = []
    for index in layers[stage]:
        stream, routed, earlier_BSD = model.layers[str(index)](stream, rotary, tokens._replace(layer=index), None, earlier_BSD)
        stats += [] if routed is None else [routed]
    if stage < last:
        return StageMessage(stream, earlier_BSD if takes_earlier(config, layers[stage].stop) else None), [], stats
    normed_BSD = model.output_dropout(model.norm(stream), model.dropout_keys(stream, tokens))
    losses = [model.head(normed_BSD, head_losses[0])]
    if model.training:
        hidden_BSD = normed_BSD if config.mtp_after_norm else stream
        losses += model.mtp_losses(hidden_BSD, ids_BS, tokens, rotary, stats, head_losses[1:])
    return StageMessage(stream), losses, stats


def takes_earlier(config: ModelConfig, layer: int) -> bool:
    """Whether the experts of `layer` take what the layer before gives, which then has to travel to a stage that begins with it."""
    return config.moe.shortcut and layer < config.layers and config.moe_layer(layer)


def between_stages(model: Transformer, mesh: Mesh, pipeline: Pipeline, ids_BS: Tensor) -> dict[int, StageMessage]:
    """Returns empty tensors like the messages to and from this rank's stages, by the stage that they enter forward."""
    config, (sequences, length) = model.config, ids_BS.shape
    x_BSD = ids_BS.new_empty(sequences, length // mesh.sequence.size, config.width, dtype=model.activations)
    columns, wide = config.moe.experts + config.moe.router.null_experts, torch.promote_types(model.activations, torch.float32)

    def entering(layer: int) -> StageMessage:
        earlier_BSD, pooled_LBC = x_BSD if takes_earlier(config, layer) else None, None
        if config.moe.balance.pool_layers and (layers := sum(map(config.moe_layer, range(layer)))):
            pooled_LBC = ids_BS.new_empty(layers, sequences, 2 * columns + 1, dtype=wide)
        return StageMessage(x_BSD, earlier_BSD, pooled_LBC)

    borders = {stage + after: (inside.start, inside.stop)[after] for stage, inside in pipeline.layers.items() for after in (0, 1)}
    return {stage: entering(layer) for stage, layer in borders.items()}
