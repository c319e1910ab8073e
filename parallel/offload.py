"""Activations that wait for the backward pass in the host's memory (`parallel.recompute=offload`).

While a block computes, what the block before it keeps is copied to pinned host memory; while the backward pass is in a block, what
the block before it kept comes back. Copies have streams of their own, so they run beside computation, and the host waits for none.
What two blocks keep is on the device at a time: the computing stream waits for the copies of a block before the second block after
it begins. Device memory is allocated and freed in the order of the computing stream, so no stream can hold back its reuse.

What is copied is memory and not tensors: once, however many tensors view it. These stay: weights and their casts, what all blocks
share (rotary tables, information of tokens), and whatever is smaller than `SMALLEST`.
"""

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from ..moe.weight_cast import noted_casts
from .streams import Event, SideStream, copy_to_device, copy_to_host, host_memory, record_event, stream_waits

SMALLEST = 2**20
"""Bytes of the smallest memory that is copied: less takes longer to begin than to copy, and is little to keep."""
WINDOW = 2
"""Blocks of which the device keeps everything."""


class _Memory:
    """Memory that a block keeps for the backward pass: on the device, on the host, or on both. Lives as long as its views."""

    def __init__(self, x: Tensor, pass_over_block: "_BlockPass") -> None:
        items = x.untyped_storage().nbytes() // x.element_size()
        self.on_device: Tensor | None = x.detach().as_strided((items,), (1,), 0)
        self.on_host: Tensor | None = None
        self.pass_over_block = pass_over_block


class _View(NamedTuple):
    """A saved tensor, as a view of its memory."""

    memory: _Memory
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _BlockPass:
    """One forward pass over one block. `earlier` is that over the block whose output this one takes; None if it is not known."""

    def __init__(self, earlier: "_BlockPass | None") -> None:
        self.earlier = earlier
        self.memories: WeakValueDictionary[int, _Memory] = WeakValueDictionary()
        """By the storage."""
        self.copied: WeakSet[_Memory] = WeakSet()
        """Those that the host has, or will have behind `copies`."""
        self.copies: Event | None = None
        self.returns: Event | None = None
        """Behind this all is on the device again; None if the computing stream need not wait."""
        self.output: Callable[[], Tensor | None] = lambda: None

    def pack(self, x: Tensor) -> Any:
        storage = x.untyped_storage()
        if storage.nbytes() < SMALLEST or storage.nbytes() % x.element_size():
            return x.detach()
        memory = self.memories.get(storage._cdata)
        if memory is None:
            memory = self.memories[storage._cdata] = _Memory(x, self)
        return _View(memory, x.dtype, x.shape, x.stride(), int(x.storage_offset()))


class Offload:
    """Runs the blocks of a rank so that what they save leaves `device`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.to_host, self.to_device = SideStream(device), SideStream(device)
        self.window: deque[_BlockPass] = deque()

    def wrap(self, block: nn.Module) -> None:
        """Makes a block run here."""
        block.forward = functools.partial(self.run, block, block.forward)

    def run(self, block: nn.Module, forward: Callable[..., Any], x_BSD: Tensor, *inputs: Any) -> Any:
        """Returns forward(x_BSD, *inputs), which is that of `block`."""
        if not torch.is_grad_enabled():
            return forward(x_BSD, *inputs)
        while len(self.window) >= WINDOW:
            self._release(self.window.popleft())
        before = self.window[-1] if self.window else None
        output = before.output() if before else None
        follows = output is not None and output.untyped_storage()._cdata == x_BSD.untyped_storage()._cdata  # FSDP makes a view
        this = _BlockPass(before if follows else None)
        with saved_tensors_hooks(this.pack, self._unpack), noted_casts() as casts:
            outputs = forward(x_BSD, *inputs)
        others = [x for x in tree_leaves((inputs[:2], casts, list(block.parameters()))) if isinstance(x, Tensor)]
        self._copy(this, {x.untyped_storage()._cdata for x in others if not isinstance(x, DTensor)})
        this.output = ref(outputs[0])
        self.window.append(this)
        return outputs

    def _copy(self, this: _BlockPass, others: set[int]) -> None:
        """Begins to copy memory to the host, but for that of `others`, and of weights that FSDP has freed and will gather again."""
        with self.to_host.behind(record_event(self.device)):
            for storage, memory in this.memories.items():
                assert memory.on_device is not None
                if storage not in others and memory.on_device.untyped_storage().nbytes():
                    memory.on_host = copy_to_host(memory.on_device, host_memory(memory.on_device))
                    this.copied.add(memory)
            this.copies = record_event(self.device)

    def _release(self, this: _BlockPass) -> None:
        """Frees memory on the device, behind the copies."""
        assert this.copies is not None
        stream_waits(this.copies)
        for memory in this.copied:
            memory.on_device = None

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        memory, this = packed.memory, packed.memory.pass_over_block
        self._fetch(this)
        if this.earlier is not None:
            self._fetch(this.earlier)
        if this.returns is not None:
            stream_waits(this.returns)
            this.returns = None
        assert memory.on_device is not None
        return memory.on_device.view(packed.dtype).as_strided(packed.size, packed.stride, packed.offset)

    def _fetch(self, this: _BlockPass) -> None:
        """Begins to copy back what is not on the device."""
        missing = [memory for memory in this.copied if memory.on_device is None]
        if not missing:
            return
        for memory in missing:
            assert memory.on_host is not None
            memory.on_device = torch.empty(memory.on_host.shape, dtype=memory.on_host.dtype, device=self.device)
        with self.to_device.behind(record_event(self.device)):
            for memory in missing:
                assert memory.on_host is not None and memory.on_device is not None
                copy_to_device(memory.on_host, memory.on_device)
            this.returns = record_event(self.device)
