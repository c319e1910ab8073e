"""What the tests of layouts share: train one model on a layout, and compare it with one process, in fp64.

Compared are losses, counts, every gradient of the first step, its norm, and the weights after three steps. Some targets are not
counted, and one expert never gets a token. Import it as `parity`: tests/conftest.py puts this folder on the path, of ranks too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from tokenyard.moe.config import ModelConfig
from tokenyard.moe.init import expert_biases
from tokenyard.moe.model import Transformer
from tokenyard.moe.tokens import Place
from tokenyard.parallel.apply import Parallel, initialise, local, parallelize
from tokenyard.parallel.config import Exchange, ParallelConfig
from tokenyard.parallel.gradients import gradient_of
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.pieces import Piece, whole
from tokenyard.train.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import Rows, StepNumbers, train_step

STEPS, SEQUENCES, LENGTH, VOCABULARY, TOLERANCE = 3, 8, 12, 40, 1e-9


class Layout(NamedTuple):
    world: int
    tensor: int = 1
    shard: int = 1
    expert: int = 1
    recompute: bool = False
    exchange: Exchange = Exchange.plain
    node_ranks: int | None = None
    overlap_chunks: int = 1


class Case(NamedTuple):
    """A model (of VOCABULARY rows) and what happens to it."""

    config: ModelConfig
    micro_batches: int = 1
    equal_scores: bool = False
    """All tokens choose the same expert in the first step; else expert 2 is starved."""
    idle_rows: int = 0
    """So many rows of each global batch have no target that counts: on some layouts a rank has no token."""
    steps: int = STEPS


def assert_layout_gives_the_numbers_of_one_process(ranks: Callable[..., list[Any]], layout: Layout, case: Case) -> None:
    expected = reference(case)
    parts = [train(layout, case)] if layout.world == 1 else ranks(layout.world, train, layout, case)
    for numbers, reference_numbers in zip(parts[0]["steps"], expected["steps"], strict=True):
        assert_equal(numbers, reference_numbers)
    for rank in parts[1:]:
        for numbers, of_rank_0 in zip(rank["steps"], parts[0]["steps"], strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(numbers, of_rank_0, strict=True))
    for kind in ("gradients", "weights"):
        for name, value in assemble([part[kind] for part in parts]).items():
            assert_close(value, expected[kind][name], f"{kind} of {name}")


_references: dict[str, dict[str, Any]] = {}


def reference(case: Case) -> dict[str, Any]:
    """One process; weights and gradients are whole."""
    if repr(case) not in _references:
        result = train(Layout(1), case)
        _references[repr(case)] = {**result, **{kind: assemble([result[kind]]) for kind in ("gradients", "weights")}}
    return _references[repr(case)]


def train(layout: Layout, case: Case) -> dict[str, Any]:
    """Three optimizer steps on this rank: their numbers, the first step's gradients and the last weights, by name and piece."""
    parallel = build(layout, case.config)
    (favour_one_expert if case.equal_scores else starve_expert)(parallel)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    steps, gradients = [], {}
    for step in range(case.steps):
        rows, place = rows_of(parallel, step, case), Place(seed=5, step=step + 1)
        steps.append(train_step(parallel, optimizer, rows, lr=0.01, clip_norm=None, place=place))
        if step == 0:
            gradients = {name: (p.piece, gradient_of(p).clone()) for name, p in parallel.placed.items()}
    weights = {name: (p.piece, local(p.parameter).detach().clone()) for name, p in parallel.placed.items()}
    weights |= {name: (whole(bias.shape), bias.double()) for name, bias in expert_biases(parallel.model).items()}
    return {"steps": steps, "gradients": gradients, "weights": weights}


def build(layout: Layout, config: ModelConfig) -> Parallel:
    with torch.device("meta"):
        model = Transformer(config, torch.float64)
    spread = ParallelConfig(**{name: value for name, value in layout._asdict().items() if name != "world"})
    parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"))
    initialise(parallel, seed=3)
    return parallel


def starve_expert(parallel: Parallel) -> None:
    """Expert 2's logit is the mean of those of 0 and 1 and of those of 3 and 4: two others are larger, for every token."""
    for weight in router_weights(parallel):
        weight[4] = weight[0] + weight[1] - weight[3]
        weight[2] = (weight[0] + weight[1]) / 2


def favour_one_expert(parallel: Parallel) -> None:
    """All logits are equal, and all tokens choose the same expert; the other ranks get none in the first step."""
    for weight in router_weights(parallel):
        weight.zero_()


def router_weights(parallel: Parallel) -> list[torch.Tensor]:
    return [local(p.parameter).data for name, p in parallel.placed.items() if name.endswith("router.weight")]


def rows_of(parallel: Parallel, step: int, case: Case) -> list[Rows]:
    """This rank's rows: a micro-step of all ranks is a run of the global batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    targets[torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.1] = -100
    targets[: case.idle_rows] = -100
    data, rows = parallel.mesh.data, SEQUENCES // case.micro_batches // parallel.mesh.data.size
    starts = range(data.rank * rows, SEQUENCES, rows * data.size)
    return [Rows(ids[start : start + rows], targets[start : start + rows], start) for start in starts]


def assemble(parts: list[dict[str, tuple[Piece, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces; every element must be there, and copies must agree."""
    wholes = {}
    for name in parts[0]:
        total = torch.full(parts[0][name][0].shape, torch.nan, dtype=torch.float64)
        for piece, value in (part[name] for part in parts):
            target = Piece(*piece).cut(total)
            known = ~target.isnan()
            assert torch.equal(target[known], value[known]), f"copies of {name} differ"
            target.copy_(value)
        assert not total.isnan().any(), f"a part of {name} is on no rank"
        wholes[name] = total
    return wholes


def assert_equal(numbers: StepNumbers, expected: StepNumbers) -> None:
    for field, value, reference_value in zip(StepNumbers._fields, numbers, expected, strict=True):
        if isinstance(value, int) or not value.is_floating_point():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(reference_value)), field
        else:
            assert_close(value, reference_value, field)


def assert_close(value: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert value.shape == expected.shape, what
    if not value.numel():
        return
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{what}: relative difference {error:.2e}"
