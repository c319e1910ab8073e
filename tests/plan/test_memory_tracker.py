"""What is counted as memory, on tensors of this process."""

import gc

import pytest
import torch
from tokenyard.plan.memory_tracker import MemoryTracker

BLOCK = 512


def test_a_storage_counts_once_from_its_operator_until_nothing_refers_to_it() -> None:
    with MemoryTracker("cpu") as memory:
        x = torch.ones(1000)
        assert memory.now == 8 * BLOCK
        part = x.view(10, 100)[2:]
        x += 1
        assert memory.now == 8 * BLOCK
        del x
        assert memory.now == 8 * BLOCK
        del part
        gc.collect()
        assert memory.now == 0


def test_resizing_frees_and_allocates() -> None:
    """As FSDP does with gathered weights."""
    with MemoryTracker("cpu") as memory:
        x = torch.ones(1000)
        x.untyped_storage().resize_(0)
        assert memory.now == 0
        x.untyped_storage().resize_(4)
        assert memory.now == BLOCK
    x.untyped_storage().resize_(4000)
    assert memory.now == BLOCK


def test_a_peak_names_what_was_alive_then() -> None:
    """Also if the purpose becomes known later."""
    with MemoryTracker("cpu") as memory:
        kept = torch.ones(128)
        passing = torch.ones(256)
        del passing
        small = torch.ones(1)
        memory.mark("weights", [kept])
        memory.end()
    (peak,) = memory.peaks.values()
    assert peak.by_purpose() == {"weights": BLOCK, "other": 2 * BLOCK}
    assert small.numel() == 1


def test_other_devices_do_not_count() -> None:
    with MemoryTracker("cuda") as memory:
        torch.ones(1000).sum()
    assert memory.now == 0
    assert not memory.peaks


def test_a_gradient_that_nobody_else_has_is_added_to_in_place() -> None:
    """As autograd does while no dispatch mode is on."""
    x = torch.ones(128, requires_grad=True)
    gradients = [torch.ones(128), torch.ones(128)]
    with MemoryTracker("cpu") as memory:
        y = x * 1
        outputs = [y * 2, y * 3]
        del y
        before = memory.now
        memory.restart()
        (found,) = torch.autograd.grad(outputs, x, gradients)
    (peak,) = memory.peaks.values()
    assert peak.bytes == before + 2 * BLOCK
    assert found.eq(5).all()


@pytest.mark.parametrize("shape", [(128,), (2, 64)])
def test_a_gradient_that_two_nodes_have_is_not_added_to_in_place(shape: tuple[int, ...]) -> None:
    """Nor if theirs are two views of the same memory."""
    x, other = torch.ones(128, requires_grad=True), torch.ones(128, requires_grad=True)
    with MemoryTracker("cpu"):
        y, z = x * 1, other * 1
        twice = y * 2
        views = [y, z] if shape == y.shape else [y.view(shape), z.view(shape)]
        outputs = [twice, views[0] + views[1]]  # the gradient of the sum, which comes first, is that of both
        found = torch.autograd.grad(outputs, [x, other], [torch.ones(128), torch.ones(shape)])
    assert found[0].eq(3).all()
    assert found[1].eq(1).all()
