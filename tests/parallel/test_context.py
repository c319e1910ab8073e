"""How sequences are cut for context ranks: each token once, each rank with as many keys, and put together in order."""

import pytest
import torch
from tokenyard.parallel.context import by_rank, in_order, own_chunks, own_runs
from tokenyard.parallel.mesh import Axis, Mesh
from tokenyard.parity.observe import runs_of


def axes(ranks: int) -> list[Axis]:
    return [Axis(ranks, rank, None) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_chunks_of_all_ranks_make_up_the_sequence(ranks: int) -> None:
    whole_BS = torch.arange(2 * 48).view(2, 48)
    parts = [own_chunks(whole_BS, axis) for axis in axes(ranks)]
    gathered_BS = torch.cat(parts, dim=1)
    assert torch.equal(in_order(gathered_BS, axes(ranks)[0]), whole_BS)
    assert torch.equal(by_rank(whole_BS, axes(ranks)[0]), gathered_BS)
    for axis, part in zip(axes(ranks), parts, strict=True):
        positions = [position for run in own_runs(48, axis) for position in run]
        assert part.tolist() == whole_BS[:, positions].tolist()


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_attend_to_equally_many_tokens(ranks: int) -> None:
    pairs = {sum(position + 1 for run in own_runs(48, axis) for position in run) for axis in axes(ranks)}
    assert pairs == {48 * 49 // 2 // ranks}


@pytest.mark.parametrize("tensor", [1, 2, 3, 4])
def test_positions_of_slices(tensor: int) -> None:
    """With three tensor ranks, the second has the end of the early chunk and the begin of the late one."""
    seen = []
    for context in range(2):
        for rank in range(tensor):
            mesh = Mesh(1, 0, {}, {("context",): Axis(2, context, None), ("tensor",): Axis(tensor, rank, None)})
            seen.append([position for run in runs_of(mesh, 48, 24 // tensor) for position in run])
    chunks = [[position for run in own_runs(48, axis) for position in run] for axis in axes(2)]
    size = 24 // tensor
    assert seen == [chunk[start : start + size] for chunk in chunks for start in range(0, 24, size)]
