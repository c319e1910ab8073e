"""torch.compile of whole blocks, and of experts whose number of rows changes in every step.

What is compiled is a function of the class, and the weights are among its arguments: so layers with equal settings share one graph.

R rows of experts, T tokens, D width, E experts.
"""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from ..moe.config import ModelConfig, Selection
from ..moe.dispatch import Choices
from ..moe.experts import Experts
from ..moe.model import Block, Transformer
from .config import ParallelConfig
from .pipeline.schedule import ZERO_BUBBLE

log = logging.getLogger("tokenyard")

MOST_GRAPHS = 64
"""Kinds of block, and shapes, that one process may compile; torch's limit is 8."""


def compile_blocks(model: Transformer, config: ParallelConfig, stage_ranks: int) -> bool:
    """Compiles whole blocks and returns True; or, if the ranks of a stage communicate in blocks, experts alone.

    With a schedule that defers the gradients of weights it does neither: compiled code computes all gradients at once.
    """
    if config.pipeline_schedule in ZERO_BUBBLE:
        return False
    exchanged = exchanged_in_blocks(model.config, config, stage_ranks)
    if exchanged is None:
        compile_whole_blocks(model)
        log.info("torch.compile: every block as one graph")
        return True
    compile_experts(model)
    log.info("torch.compile: experts of any number of rows; blocks are several graphs, because they exchange %s", exchanged)
    return False


def exchanged_in_blocks(model: ModelConfig, config: ParallelConfig, stage_ranks: int) -> str | None:
    """Returns what the ranks of a stage exchange inside of blocks; None: nothing, so that each block can be one graph."""
    routing, limits = model.moe.router, model.moe.capacity
    scoped = routing.selection in (Selection.expert_choice, Selection.sinkhorn, Selection.gshard)
    exchanges = {
        "slices of sequences": config.tensor > 1,
        "keys and values of other context ranks": config.context > 1,
        "rows of experts": config.expert > 1 or config.expert_tensor > 1,
        "counts of a scope": stage_ranks > 1 and (scoped or limits.factor is not None or any(limits.schedule)),
    }
    return next((what for what, happens in exchanges.items() if happens), None)


def compile_whole_blocks(model: Transformer) -> None:
    """Makes each block one graph in training. Elsewhere it runs as it is: each length of a cache would be a graph of its own."""
    compiled = _shared(Block.forward)
    for block in model.blocks:
        block.forward = functools.partial(_run_block, compiled, block)


def compile_experts(model: Transformer) -> None:
    """Makes the experts of each layer one graph, for any number of rows."""
    compiled = _shared(Experts.forward)
    for block in model.blocks:
        if block.moe is not None:
            block.moe.experts.forward = functools.partial(_run_experts, compiled, block.moe.experts)


def _shared(function: Any) -> Any:
    """Returns a compiled function that many modules call; it raises an error if it is more than one graph."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(function, fullgraph=True)


def _run_block(compiled: Any, block: Block, *inputs: Any, **named: Any) -> Any:
    return (compiled if block.training else Block.forward)(block, *inputs, **named)


def _run_experts(
    compiled: Any, experts: Experts, x: Tensor, counts_E: Tensor, choices: Choices | None = None, keys_R: Tensor | None = None
) -> Tensor:
    """No rows or one row would be a graph of its own."""
    rows = [x, keys_R] if choices is None else [choices.plan.token_R, choices.plan.filled_R]
    if not experts.training or min(len(each) for each in rows if each is not None) < 2:
        return Experts.forward(experts, x, counts_E, choices, keys_R)
    for each in rows:
        if each is not None:
            torch._dynamo.maybe_mark_dynamic(each, 0)
    return compiled(experts, x, counts_E, choices, keys_R)
