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
from ..moe.linear import Linear
from ..moe.model import Block, Transformer
from .config import ParallelConfig
from .pipeline.schedule import ZERO_BUBBLE

log = logging.getLogger("tokenyard")

MOST_GRAPHS = 64
"""Kinds of block, and shapes, that one process may compile; torch's limit is 8."""


def compile_blocks(model: Transformer, config: ParallelConfig, stage_ranks: int, device: torch.device) -> bool:
    """Compiles whole blocks and returns True; or, if the ranks of a stage communicate in blocks, the parts between and experts.

    With a schedule that defers the gradients of weights it compiles what has none: compiled code computes the gradients of all its
    inputs at once.
    """
    if device.type == "cpu":
        _name_vector_width()
    if config.pipeline_schedule in ZERO_BUBBLE:
        compile_parts(model, eager_products=True)
        log.info("torch.compile: norms, and attention between its products, of every block")
        return False
    exchanged = exchanged_in_blocks(model.config, config, stage_ranks)
    if exchanged is None:
        compile_whole_blocks(model)
        log.info("torch.compile: every block as one graph")
        return True
    compile_parts(model, eager_products=False)
    compile_experts(model)
    log.info("torch.compile: attention, norms, feed-forwards and experts of every block, which exchange %s between", exchanged)
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


def compile_parts(model: Transformer, eager_products: bool) -> None:
    """Compiles all but routing, dispatch and experts.

    With `eager_products` products with weights stay outside of it, and so do dense feed-forwards, whose activation has a kernel of
    its own.
    """
    for block in model.blocks:
        norms = (block.attention_norm, block.attention_post_norm, block.feedforward_norm, block.feedforward_post_norm)
        for module in (block.attention, *norms, None if eager_products else block.dense):
            if module is not None:
                module.compile()
        for part in block.attention.modules() if eager_products else ():
            if isinstance(part, Linear):
                eager: Any = torch.compiler.disable(part.forward)
                part.forward = eager


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


def _name_vector_width() -> None:
    """Makes the width of this CPU's vectors a part of the key of torch's cache of compiled graphs.

    A folder in a home or a /tmp that moves between machines would otherwise give code for wider vectors than a kernel is built with
    (torch 2.13), which overwrites memory.
    """
    from torch._inductor import config, cpu_vec_isa  # takes seconds to import

    config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()
