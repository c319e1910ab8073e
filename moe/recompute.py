"""Selective recomputation: what a block keeps for the backward pass, in which it is computed again (Korthikanti et al. 2022).

Kept are results that take long for their bytes: grouped products, dense products of the width of the model or wider, fused
attention, top-k, whatever came over the network, and what the host read. Repeated are norms, activations, rotary embedding, copies
and gathers of rows, casts, and products of narrow rows, which are MLA's up-projections: an element of a product of rows of K
numbers costs K multiplications, so their bytes save least (DeepSeek-V3, section 3.2.3, repeats them too).

The first pass over a block puts the results on a tape, the second takes them off in the same order. torch's selective checkpointing
keeps results of operators, but a collective is none: it writes into memory that was allocated before, and ends later.
"""

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Result = TypeVar("Result")


class _Tape:
    """The results of one forward pass of one block."""

    def __init__(self) -> None:
        self.results: deque[Any] = deque()
        self.repeats = False


class _ThisThread(threading.local):
    """The tape of the block that this thread is computing. A checkpoint may be written by another thread at the same time."""

    tape: _Tape | None = None


_this_thread = _ThisThread()


def keep(function: Callable[[], Result]) -> Result:
    """Returns function(), or what it returned in the first pass over the block. Must not be differentiated through.

    Outside of blocks that are recomputed selectively nothing is kept. Nobody may write into a result.
    """
    if torch.compiler.is_compiling() or (tape := _this_thread.tape) is None:
        return function()
    if tape.repeats:
        return tape.results.popleft()
    _this_thread.tape = None  # results inside of this one are not kept
    try:
        result = function()
    finally:
        _this_thread.tape = tape
    tape.results.append(tree_map_only(Tensor, Tensor.detach, result))  # autograd links the result itself to its inputs
    return result


def repeats() -> bool:
    """Whether this is a second pass, in which `keep` computes nothing."""
    return not torch.compiler.is_compiling() and _this_thread.tape is not None and _this_thread.tape.repeats


def in_second_pass() -> bool:
    """Whether this forward pass is a second one: whether this thread is in a backward pass."""
    return torch._C._current_graph_task_id() >= 0


def selective_contexts(width: int) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Returns contexts for the two passes over a block of a model of this width, as `context_fn` of torch.utils.checkpoint."""
    tape = _Tape()
    return _using(tape, width, repeats=False), _using(tape, width, repeats=True)


@contextmanager
def _using(tape: _Tape, width: int, repeats: bool) -> Iterator[None]:
    before, _this_thread.tape, tape.repeats = _this_thread.tape, tape, repeats
    try:
        with _KeptOperators(width):
            yield
    finally:
        _this_thread.tape = before
        if repeats:  # it ends where nobody needs what follows
            tape.results.clear()


class _KeptOperators(TorchDispatchMode):
    """Keeps the results of operators, below autograd: the second pass differentiates them as the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Lets a compiled function (FlexAttention) run as if there were no mode. It is repeated as a whole."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        call, (kept, products) = functools.partial(func, *args, **(kwargs or {})), _operators()
        wide = func in products and args[products[func]].shape[-1] >= self.width
        return keep(call) if wide or func in kept else call()


@functools.cache
def _operators() -> tuple[set[Any], dict[Any, int]]:
    """Returns operators that are always kept, and products with the place of the rows among their arguments."""
    aten, ours = torch.ops.aten, torch.ops.tokenyard
    attention = "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"
    kept = {getattr(aten, f"_scaled_dot_product_{kind}").default for kind in attention}
    kept |= {aten._scaled_dot_product_fused_attention_overrideable.default, ours.route.default}
    dense = {aten.mm.default: 0, aten.addmm.default: 1, ours.full_product.default: 0, ours.wide_mm.default: 0}
    return kept, dense | {ours.grouped_mm.default: 0, ours.scaled_grouped_mm.default: 0}  # those in FP8 are of one group
