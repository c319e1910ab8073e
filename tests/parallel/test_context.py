"""How sequences are cut for context ranks: each token once, each rank with as many keys, and put together in order."""

import pytest
import torch
from tokenyard.moe.flexible_attention import block_mask
from tokenyard.moe.softmax import Softmax
from tokenyard.parallel.context import attend_in_chunks, by_rank, in_order, own_chunks, own_runs
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


@pytest.mark.parametrize("rank", [0, 1])
def test_compiled_attention_takes_the_masks_of_both_chunks(rank: int) -> None:
    """FlexAttention on a GPU, in one graph: the same as with masks of all pairs. Generating code is left out."""
    axis, softmax, documents_BS = Axis(2, rank, None), Softmax(0.3, 1.5, 70), torch.arange(512).div(200).long().view(1, 512)
    q_BHsh, k_BGSh, v_BGSv = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 512, 16), torch.randn(1, 2, 512, 16)
    blocks = [block_mask(run.stop, 70, torch.device("cpu"), documents_BS, run.start) for run in own_runs(512, axis)]
    torch.compiler.reset()
    run = torch.compile(attend_in_chunks, fullgraph=True, backend="aot_eager")
    compiled = run(axis, q_BHsh, k_BGSh, v_BGSv, softmax, None, documents_BS, blocks)
    expected = attend_in_chunks(axis, q_BHsh, k_BGSh, v_BGSv, softmax, None, documents_BS)
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
