"""The symmetric exchange: bit for bit the plain one; without room it drops the last rows of each expert; nothing stays behind.

As on a GPU: in a dry run on real numbers shapes are those of a GPU and its kernel puts the rows, in Triton's interpreter.
"""

import os
import signal
import time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from pool import RankError
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import Dispatcher
from tokenyard.moe.experts import Experts
from tokenyard.moe.recompute import selective_contexts
from tokenyard.moe.router import Routing
from tokenyard.parallel.apply import build_dispatcher
from tokenyard.parallel.config import Exchange, Overflow, ParallelConfig, Recompute
from tokenyard.parallel.dispatch import symmetric
from tokenyard.parallel.dispatch.all_to_all import AllToAllDispatcher
from tokenyard.parallel.dispatch.shared_memory import MappedMemory
from tokenyard.parallel.dispatch.symmetric import SymmetricDispatcher, kept_counts, plan_return, plan_targets
from tokenyard.parallel.layout import room
from tokenyard.parallel.mesh import build_mesh
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EXPERTS, WIDTH, HIDDEN, TOP_K, TOKENS, RANKS = 8, 8, 8, 3, 7, 4
FIRSTS = torch.arange(EXPERTS)


class Part(NamedTuple):
    """The tokens of a rank."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    padded_rows: int | None = None
    keys_T: Tensor | None = None


def parts_of(
    dtype: torch.dtype, dropped: float | None = None, skew: float = 0.0, padded: int | None = None, keys: bool = False
) -> list[Part]:
    """`dropped` of the choices are dropped; `skew` prefers the first experts."""
    torch.manual_seed(0)
    return [
        Part(
            torch.randn(TOKENS, WIDTH, dtype=dtype),
            (torch.rand(TOKENS, EXPERTS) + skew * FIRSTS).argsort(1)[:, :TOP_K],
            torch.rand(TOKENS, TOP_K, dtype=dtype),
            None if dropped is None else torch.rand(TOKENS, TOP_K) >= dropped,
            padded,
            torch.randint(2**40, (TOKENS,)) if keys else None,
        )
        for _ in range(RANKS)
    ]


def passes(dispatcher: Dispatcher, experts: Experts, part: Part, recompute: Recompute = Recompute.none) -> dict[str, Tensor]:
    """Two passes, both forward before the first goes backward: outputs, gradients, and what the dispatcher says."""
    found, started, run = {}, [], dispatcher.run
    if recompute is not Recompute.none:
        settings = {"context_fn": partial(selective_contexts, WIDTH)} if recompute is Recompute.selective else {}
        run: Any = partial(checkpoint, dispatcher.run, use_reentrant=False, **settings)
    for index in range(2):
        x_TD, weights_TK = ((index + 1.0) * part.x_TD).requires_grad_(), part.weights_TK.clone().requires_grad_()
        stats: Any = None
        routing = Routing(part.experts_TK, weights_TK, part.kept_TK, stats, part.padded_rows, part.keys_T)
        y_TD, _, rows, overflow = run(x_TD, routing, experts, lambda: lambda: None)
        started.append((y_TD, x_TD, weights_TK))
        found[f"rows {index}"] = torch.as_tensor(rows)
        if overflow is not None:
            found[f"overflow {index}"] = overflow
    for index, (y_TD, x_TD, weights_TK) in enumerate(started):
        y_TD.square().sum().backward()
        assert x_TD.grad is not None and weights_TK.grad is not None
        found |= {f"y {index}": y_TD.detach(), f"x {index}": x_TD.grad, f"weights {index}": weights_TK.grad}
    return found | {name: weight.grad for name, weight in experts.named_parameters() if weight.grad is not None}


def experts_of(rank: int, ranks: int, dtype: torch.dtype, dropout: float = 0.0) -> Experts:
    """A rank's share of the experts."""
    generator = torch.Generator().manual_seed(1)
    experts = Experts(EXPERTS, WIDTH, HIDDEN, dtype, bias=True, dropout=dropout)
    for name, parameter in list(experts.named_parameters()):
        torch.nn.init.normal_(parameter, generator=generator)
        setattr(experts, name, torch.nn.Parameter(parameter.detach().chunk(ranks)[rank].clone()))
    experts.first_expert = rank * EXPERTS // ranks
    return experts


def exchanged(
    config: ParallelConfig, parts: list[Part], dropout: float = 0.0, recompute: Recompute = Recompute.none
) -> dict[str, Tensor]:
    """`parts`: of each rank."""
    config.expert = size = len(parts)
    mesh = build_mesh(config)
    rank = mesh.axis("expert").rank
    experts = experts_of(rank, size, parts[0].x_TD.dtype, dropout)
    return passes(build_dispatcher(EXPERTS, mesh, config), experts, parts[rank], recompute)


CHOICES = [{}, {"dropped": 0.4}, {"dropped": 0.3, "padded": TOKENS}, {"skew": 9.0}, {"keys": True}]


def differences() -> list[str]:
    """On a rank: what is not bit for bit that of the plain exchange."""
    wrong = []
    for dtype, choices, on_device in product([torch.float32, torch.float64], CHOICES, [False, True]):
        parts, dropout = parts_of(dtype, **choices), 0.5 if "keys" in choices else 0.0
        expected = exchanged(ParallelConfig(), parts, dropout)
        if on_device and dtype == torch.float32:  # whose kernels round otherwise
            continue
        with dry_run("cuda") if on_device else nullcontext() as seen:
            found = exchanged(ParallelConfig(exchange=Exchange.symmetric, exchange_rows=float(RANKS)), parts, dropout)
        case = f"{dtype}, {choices}, as on a GPU: {on_device}"
        wrong += [f"{case}: {name}" for name, value in expected.items() if not torch.equal(found[name], value)]
        wrong += [f"{case}: overflow" for name, value in found.items() if name.startswith("overflow") and value != 0]
        wrong += [f"{case}: waits" for _ in (seen.waits.elements() if seen is not None else [])]
    return wrong


def test_the_bits_of_the_plain_exchange(ranks: Any) -> None:
    """Forward, gradients and rows, for two passes in flight; and no host waits."""
    assert ranks(RANKS, differences) == RANKS * [[]]


OVERFLOWING = [(1.0, 0.0), (0.5, 0.0), (1.0, 9.0), (0.01, 9.0), (2.0, 0.5)]
"""The room of a rank and the skew of the routing."""


def kept_by_loop(parts: list[Part], rows: float) -> list[Tensor]:
    """Returns which choices each rank keeps if it gives them out one by one, in the order of (expert, rank, token)."""
    most, local = room(TOKENS, TOP_K, EXPERTS, RANKS, rows), EXPERTS // RANKS
    total = [sum(int((part.experts_TK == expert).sum()) for part in parts) for expert in range(EXPERTS)]
    kept = [torch.zeros_like(part.experts_TK, dtype=torch.bool) for part in parts]
    for expert in range(EXPERTS):
        of_rank = total[expert // local * local :][:local]
        limit = max(limit for limit in range(RANKS * TOKENS + 1) if sum(min(count, limit) for count in of_rank) <= most)
        for part, kept_TK in zip(parts, kept, strict=True):
            for place in (part.experts_TK == expert).nonzero().tolist()[: max(limit, 0)]:
                kept_TK[tuple(place)] = True
                limit -= 1
    return kept


def differences_with_overflow() -> list[str]:
    """On a rank: what is not bit for bit that of the plain exchange which drops the same choices."""
    wrong = []
    for (rows, skew), on_device in product(OVERFLOWING, [False, True]):
        parts = parts_of(torch.float64, skew=skew)
        kept = kept_by_loop(parts, rows)
        expected = exchanged(ParallelConfig(), [part._replace(kept_TK=kept_TK) for part, kept_TK in zip(parts, kept, strict=True)])
        with dry_run("cuda") if on_device else nullcontext():
            found = exchanged(ParallelConfig(exchange=Exchange.symmetric, exchange_rows=rows), parts)
        overflow = int((~kept[dist.get_rank()]).sum())
        case = f"room {rows}, skew {skew}, as on a GPU: {on_device}"
        wrong += [f"{case}: {name}" for name, value in expected.items() if not torch.equal(found[name], value)]
        wrong += [f"{case}: overflow {found['overflow 0']}, not {overflow}" for _ in [0] if found["overflow 0"] != overflow]
        assert sum(int((~kept_TK).sum()) for kept_TK in kept) > 0
    return wrong


def test_choices_without_room_are_dropped_and_counted(ranks: Any) -> None:
    """The last of each crowded expert in the order of the tokens of all ranks, as one device would drop them."""
    assert ranks(RANKS, differences_with_overflow) == RANKS * [[]]


CROWDED = [(0.01, {}), (1.0, {"dropped": 0.3, "keys": True}), (8.0, {})]
"""Room of a rank and choices, of which all tokens make the same. In the last case everything fits."""


class Repaired(NamedTuple):
    wrong: list[str]
    """What is not bit for bit that of the plain exchange."""
    transfers: list[int]
    """Of each case without recomputation."""
    overflow: list[int]


def repaired(size: int) -> Repaired:
    """On a rank: the cases, also recomputed, and as on a GPU, which reads the rounds."""
    found = Repaired([], [], [])
    ways = [*product(Recompute, [False]), (Recompute.none, True)]
    for (rows, choices), (recompute, on_device) in product(CROWDED, ways):
        parts, dropout = parts_of(torch.float64, skew=9.0, **choices)[:size], 0.5 if "keys" in choices else 0.0
        expected = exchanged(ParallelConfig(), parts, dropout)
        config = ParallelConfig(exchange=Exchange.symmetric, exchange_rows=rows, exchange_overflow=Overflow.repair)
        counted = patch.object(MappedMemory, "barrier", autospec=True, side_effect=barrier)
        reads = patch.object(symmetric, "host_read", lambda x, *_: x.tolist()) if on_device else nullcontext()
        with counted as transfers, reads, dry_run("cuda") if on_device else nullcontext():
            got = exchanged(config, parts, dropout, recompute)
        case = f"room {rows}, {choices}, {recompute}, as on a GPU: {on_device}"
        found.wrong.extend(f"{case}: {name}" for name, value in expected.items() if not torch.equal(got[name], value))
        if recompute is Recompute.none:
            found.transfers.append(transfers.call_count)
            found.overflow.append(int(got["overflow 0"]))
    return found


@pytest.mark.parametrize(("size", "rounds", "overflow"), [(2, 2, 21), (4, 3, 43)])
def test_rows_without_room_come_in_further_rounds(ranks: Any, size: int, rounds: int, overflow: int) -> None:
    """With the bits of the plain exchange. Three experts of 7 rows of each rank: two of four are on one rank, or all on one of two.

    The memory has room for the 21 rows of a rank. Two passes there and back, which one round makes twice, in both directions.
    """
    found: list[Repaired] = ranks(size, repaired, size)
    assert not [wrong for each in found for wrong in each.wrong]
    ways, opened = [0, 1], 1  # memory is opened behind a barrier
    for each in found:
        first, second = each.transfers[:2], each.transfers[-2:]
        assert first == [4 * rounds + 4 + opened for _ in ways] and second == [8 + opened for _ in ways]
    total = torch.tensor([each.overflow for each in found]).sum(0).tolist()
    assert total[:2] == [overflow, overflow] and total[-2:] == [0, 0]


def grown_and_unnamed() -> tuple[list[bool], list[str], str]:
    """On a rank: passes of 2, 7 and 2 tokens through one dispatcher; how its memory is mapped; what unequal tokens end in.

    Rank 0 copies its rows long after the barrier, when the others put theirs of the next transfer.
    """
    mesh, rank = build_mesh(ParallelConfig(expert=RANKS)), dist.get_rank()
    symmetric = SymmetricDispatcher(EXPERTS, mesh.axis("expert"), float(RANKS))
    plain, parts, same = AllToAllDispatcher(EXPERTS, mesh.axis("expert")), parts_of(torch.float64), []
    with patch.object(MappedMemory, "barrier", late if rank == 0 else MappedMemory.barrier):
        for tokens in (2, 7, 2):
            part = Part(*(x[:tokens] for x in parts[rank][:3]), None)  # pyright: ignore[reportCallIssue]
            found, expected = (passes(each, experts_of(rank, RANKS, torch.float64), part) for each in (symmetric, plain))
            same.append(all(torch.equal(found[name], value) for name, value in expected.items()))
    maps = [line.split()[5:] for line in Path("/proc/self/maps").read_text().splitlines() if "tokenyard-exchange" in line]
    files = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not any("tokenyard-exchange" in file for file in files)
    try:
        MappedMemory(mesh.axis("expert"), 4096 * (1 + rank))
    except RuntimeError as error:
        return same, [" ".join(words) for words in maps], str(error)
    raise AssertionError


barrier = MappedMemory.barrier


def late(memory: MappedMemory) -> None:
    barrier(memory)
    time.sleep(0.03)


def test_memory_grows_and_has_no_name(ranks: Any) -> None:
    for same, maps, error in ranks(RANKS, grown_and_unnamed):
        assert same == [True, True, True]
        assert len(maps) == RANKS and all(line == "/memfd:tokenyard-exchange (deleted)" for line in maps)
        assert error.startswith("parallel.exchange=symmetric needs equally many tokens") and "\n" not in error


def killed_in_a_pass(victim: int) -> None:
    rank, mesh = dist.get_rank(), build_mesh(ParallelConfig(expert=RANKS))
    symmetric, part = SymmetricDispatcher(EXPERTS, mesh.axis("expert"), 2.0), parts_of(torch.float64)[dist.get_rank()]
    if rank == victim:

        def killed(*_: Any) -> Tensor:
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError

        symmetric.combine = killed
    passes(symmetric, experts_of(rank, RANKS, torch.float64), part)


def test_a_killed_rank_ends_the_others_and_leaves_no_file(ranks: Any) -> None:
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(RankError, match="rank 2"):
        ranks(RANKS, killed_in_a_pass, 2, limit_seconds=120.0)
    assert set(Path("/dev/shm").iterdir()) <= before


@pytest.mark.parametrize("seed", range(5))
def test_targets_and_their_inverse(seed: int) -> None:
    """Every kept row arrives once, in the order of (expert, rank, nth), and goes back to where it came from."""
    torch.manual_seed(seed)
    ranks, experts = [(2, 4), (3, 3), (4, 8), (1, 5), (2, 2)][seed]
    counts_NE, most = torch.randint(4, (ranks, experts)), [9, 3, 6, 30, 0][seed]
    kept_NE = kept_counts(counts_NE, most)
    assert kept_NE.view(ranks, ranks, -1).sum((0, 2)).max() <= most and ((kept_NE >= 0) & (kept_NE <= counts_NE)).all()
    for rank in range(ranks):
        there, rows = plan_targets(counts_NE, kept_NE, rank, 40), counts_NE[rank].sum()
        assert (there.rank_R >= 0).sum() == kept_NE[rank].sum() and (there.rank_R[rows:] == -1).all()
        for destination in range(ranks):
            back = plan_return(counts_NE, kept_NE, destination, 40)
            sent = (there.rank_R == destination).nonzero().flatten()
            assert torch.equal(back.rank_R[there.row_R[sent]], torch.full_like(sent, rank))
            assert torch.equal(back.row_R[there.row_R[sent]], sent)
            assert (there.row_R[sent].diff() > 0).all()


def test_room() -> None:
    assert room(tokens=10, top_k=3, experts=8, ranks=4, rows=1.5) == 45
    assert room(tokens=10, top_k=3, experts=8, ranks=4, rows=4.0) == 4 * 10 * 2, "no more than two experts of a token are on a rank"
    assert room(tokens=0, top_k=3, experts=8, ranks=4, rows=2.0) == 0
