"""Memory that all ranks of an axis can write to, as the symmetric exchange needs it, on one host.

CUDA: torch's symmetric memory (torch.distributed._symmetric_memory), which NVLink or PCIe reaches. CPU: memory without a name
(memfd_create), which the others map through /proc. No file appears in any folder, so ranks that are killed leave none; the kernel
frees the memory with the last process that maps it.
"""

import os
from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from ...moe.device import KERNELS_LACK
from ..collectives import stack_over
from ..mesh import Axis
from ..progress import collective
from ..streams import on_device


class SharedMemory(ABC):
    """`peers[rank]`, uint8 of the same size each, is the memory of each rank of the axis; this rank's own is among them."""

    def __init__(self, axis: Axis, peers: list[Tensor]) -> None:
        self.axis, self.peers = axis, peers

    def addresses(self) -> Tensor:
        """Returns the address of each rank's memory, (N,) int64 on the device, for kernels. Copies from the host."""
        return on_device(torch.tensor([peer.data_ptr() for peer in self.peers]), self.peers[0].device)

    @abstractmethod
    def barrier(self) -> None:
        """What any rank wrote before, all ranks see behind it. On a GPU the device waits for the other ranks, not the host."""


class OwnMemory(SharedMemory):
    """The memory of an axis of one rank."""

    def __init__(self, axis: Axis, size: int, device: torch.device) -> None:
        super().__init__(axis, [torch.empty(size, dtype=torch.uint8, device=device)])

    def barrier(self) -> None:
        pass


class MappedMemory(SharedMemory):
    """Memory of processes of one host."""

    def __init__(self, axis: Axis, size: int) -> None:
        """Collective. Raises RuntimeError if the ranks want different sizes, or are not on one host."""
        own = os.memfd_create("tokenyard-exchange")
        os.truncate(own, size)
        files_N3 = stack_over(torch.tensor([os.getpid(), own, size]), axis).tolist()
        if any(theirs != size for *_, theirs in files_N3):
            os.close(own)
            raise RuntimeError(
                f"parallel.exchange=symmetric needs equally many tokens on each rank: {files_N3} (process, file, bytes)"
            )
        paths = [f"/proc/{process}/fd/{file}" for process, file, _ in files_N3]
        super().__init__(axis, [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path in paths])
        self.barrier()  # all have mapped it
        os.close(own)

    def barrier(self) -> None:
        with collective("barrier", self.axis):
            dist.barrier(group=self.axis.group)


class DeviceMemory(SharedMemory):
    """Memory of the GPUs of one host. `handle.barrier` runs in the current stream."""

    def __init__(self, axis: Axis, size: int, device: torch.device) -> None:
        """Collective. Raises RuntimeError without triton, whose kernel puts the rows."""
        import torch.distributed._symmetric_memory as symmetric_memory

        if KERNELS_LACK:
            raise RuntimeError(
                f"parallel.exchange=symmetric needs {' and '.join(KERNELS_LACK)}; nearest valid: parallel.exchange=plain"
            )
        assert axis.group is not None
        self.handle = symmetric_memory.rendezvous(symmetric_memory.empty(size, dtype=torch.uint8, device=device), axis.group)
        super().__init__(axis, [self.handle.get_buffer(rank, (size,), torch.uint8) for rank in range(axis.size)])

    def barrier(self) -> None:
        with collective("barrier", self.axis):
            self.handle.barrier(channel=0)


def open_memory(axis: Axis, size: int, device: torch.device) -> SharedMemory:
    """Returns `size` bytes for each rank. Collective; the ranks want the same size."""
    if axis.size == 1:
        return OwnMemory(axis, size, device)
    return DeviceMemory(axis, size, device) if device.type == "cuda" else MappedMemory(axis, size)
