"""The memory of GPUs by torch's symmetric memory, of which a machine without GPUs has the signatures alone."""

from unittest.mock import create_autospec, patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from tokenyard.parallel.dispatch import shared_memory
from tokenyard.parallel.mesh import Axis

CPU = torch.device("cpu")


def test_the_calls_of_torch_exist_as_they_are_made() -> None:
    """Autospecs refuse arguments that torch's functions do not take."""
    memories = [torch.zeros(64, dtype=torch.uint8) for _ in range(2)]
    axis = Axis(2, 1, create_autospec(dist.ProcessGroup, instance=True))
    handle = create_autospec(symmetric_memory._SymmetricMemory, instance=True)
    handle.get_buffer.side_effect = lambda rank, sizes, dtype: memories[rank]
    with (
        patch.object(symmetric_memory, "empty", autospec=True) as empty,
        patch.object(symmetric_memory, "rendezvous", autospec=True, return_value=handle) as rendezvous,
        patch.object(shared_memory, "KERNELS_LACK", []),
    ):
        found = shared_memory.DeviceMemory(axis, 64, CPU)
    empty.assert_called_once_with(64, dtype=torch.uint8, device=CPU)
    rendezvous.assert_called_once_with(empty.return_value, axis.group)
    assert [call.args for call in handle.get_buffer.call_args_list] == [(0, (64,), torch.uint8), (1, (64,), torch.uint8)]
    assert found.addresses().tolist() == [memory.data_ptr() for memory in memories]
    found.barrier()
    handle.barrier.assert_called_once_with(channel=0)


def test_without_triton_it_is_refused_in_one_line() -> None:
    with patch.object(shared_memory, "KERNELS_LACK", ["triton"]), pytest.raises(RuntimeError) as raised:
        shared_memory.DeviceMemory(Axis(2, 0, None), 64, CPU)
    assert str(raised.value) == "parallel.exchange=symmetric needs triton; nearest valid: parallel.exchange=plain"


def test_an_axis_of_one_rank_shares_with_nobody() -> None:
    memory = shared_memory.open_memory(Axis(1, 0, None), 64, CPU)
    memory.barrier()
    assert [len(peer) for peer in memory.peers] == [64]
