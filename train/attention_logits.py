"""The largest attention logit of each head in a step, and QK-clip, which keeps it from growing (Kimi K2, arXiv:2507.20534, 2.1).

A blocks with softmax attention, H query heads, R rows of a weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..moe.config import AttentionKind, ModelConfig
from ..moe.param_count import head_width
from ..parallel.apply import Parallel, local
from ..parallel.collectives import max_over
from ..parallel.progress import in_phase


def attention_layers(model: ModelConfig) -> list[int]:
    """Returns the indices of the blocks with softmax attention; blocks of multi-token prediction follow the model's own."""
    return [index for index in range(model.layers + model.mtp_depth) if not model.linear_layer(index)]


def watch(parallel: Parallel, watches: bool) -> None:
    """Makes attention keep the largest logit of each head from now on, or not."""
    model = parallel.model
    wide = torch.promote_types(model.activations, torch.float32)
    for attention in _attentions(parallel).values():
        largest_H = attention.softmax.largest_H
        if not watches:
            attention.softmax = attention.softmax._replace(largest_H=None)
        elif largest_H is not None:
            largest_H.fill_(-torch.inf)
        else:
            heads = model.config.heads // parallel.mesh.tensor.size
            largest_H = torch.full((heads,), -torch.inf, dtype=wide, device=parallel.device)
            attention.softmax = attention.softmax._replace(largest_H=largest_H)


def is_watched(parallel: Parallel) -> bool:
    """Returns whether attention keeps the largest logit of each head."""
    return any(attention.softmax.largest_H is not None for attention in _attentions(parallel).values())


@contextmanager
def watching(parallel: Parallel) -> Iterator[Tensor]:
    """Watches inside. Yields what `largest_logits` returns then, which is filled at the end."""
    before = is_watched(parallel)
    watch(parallel, True)
    largest_AH = torch.empty(len(attention_layers(parallel.model.config)), parallel.model.config.heads, dtype=torch.float64)
    largest_AH = largest_AH.to(parallel.device)
    yield largest_AH
    largest_AH.copy_(largest_logits(parallel))
    if not before:
        watch(parallel, False)


def largest_logits(parallel: Parallel) -> Tensor:
    """Returns (A, H) fp64 of what this rank has seen, -inf elsewhere."""
    layers, tensor = attention_layers(parallel.model.config), parallel.mesh.tensor
    shape = len(layers), parallel.model.config.heads
    largest_AH = torch.full(shape, -torch.inf, dtype=torch.float64, device=parallel.device)
    for index, attention in _attentions(parallel).items():
        if attention.softmax.largest_H is not None:
            largest_AH[layers.index(index)].view(tensor.size, -1)[tensor.rank] = attention.softmax.largest_H
    return largest_AH


@in_phase("update")
@torch.no_grad()
def clip_heads(parallel: Parallel, largest_AH: Tensor, most: float) -> Tensor:
    """Scales down queries and keys of each head whose largest logit in the step is above `most`, so that it would have been that.

    `largest_AH`: of this rank. Returns the largest of all, and the number of clipped heads, fp64 (2,). The host does not wait.
    """
    largest_AH = max_over(largest_AH, parallel.mesh.everyone)
    clipped_AH = largest_AH > most
    factor_AH = torch.where(clipped_AH, most / largest_AH, 1.0)
    model = parallel.model.config
    for index, factor_H in zip(attention_layers(model), factor_AH, strict=True):
        block = f"layers.{index}" if index < model.layers else f"mtp.{index - model.layers}.block"
        for name, factor_R in row_factors(model, factor_H).items():
            sharded = parallel.parameters.get(f"{block}.attention.{name}")
            if sharded is not None:
                weight, shard = local(sharded.parameter.data), sharded.metadata
                factor_R = factor_R.narrow(0, shard.offsets[0], shard.sizes[0]).to(weight.dtype)
                weight.mul_(factor_R.unsqueeze(-1) if weight.ndim > 1 else factor_R)
    return torch.stack([largest_AH.amax(), clipped_AH.sum().double()])


def row_factors(model: ModelConfig, factor_H: Tensor) -> dict[str, Tensor]:
    """Returns what the rows (R,) of the weights of attention are multiplied by, so that logits of each head are by its factor.

    Queries and keys of a head take the root of its factor each. Where heads share a key (grouped queries, the rotary key of
    latents), it stays as it is, and the queries take the whole factor, so no head changes the logits of another.
    """
    root_H, one_H = factor_H.sqrt(), torch.ones_like(factor_H)
    if model.attention.kind is AttentionKind.mla:
        mla = model.attention.mla
        queries = _rows((root_H, mla.nope_width), (factor_H, mla.rope_width))
        keys = _rows((root_H, mla.nope_width), (one_H, mla.value_width))
        return {"q.weight" if mla.q_rank is None else "q_up.weight": queries, "kv_up.weight": keys}
    shared, width = model.kv_heads < model.heads, head_width(model)
    queries = _rows((factor_H if shared else root_H, width))
    found = {"q.weight": queries, "q.bias": queries}
    return found if shared else found | {"k.weight": queries, "k.bias": queries}


def _rows(*parts: tuple[Tensor, int]) -> Tensor:
    """(R,): for each head the factor of each part as often as it has rows."""
    return torch.cat([factor_H.unsqueeze(-1).expand(-1, rows) for factor_H, rows in parts], dim=-1).flatten()


def _attentions(parallel: Parallel) -> dict[int, Any]:
    """Returns the softmax attention of each block of this rank."""
    layers, model = attention_layers(parallel.model.config), parallel.model
    return {index: block.attention for index, block in zip(model.block_indices, model.blocks, strict=True) if index in layers}
