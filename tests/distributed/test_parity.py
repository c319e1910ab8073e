"""Every layout gives the numbers of one process, in fp64: losses, counts, every gradient, the norm, the weights after 3 steps.

Both losses are on, one expert never gets a token, some targets are not counted, and tokens are dropped where the case says so.
"""

from typing import Any, NamedTuple

import pytest
import torch
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import Parallel, initialise, local, parallelize
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.gradients import gradient_of
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.pieces import Piece
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


LAYOUTS = {
    "one process, recompute": Layout(1, recompute=True),
    "replicate 2": Layout(2),
    "shard 2": Layout(2, shard=2),
    "expert 2 of 2": Layout(2, expert=2),
    "tensor 2": Layout(2, tensor=2),
    "expert 2 over tensor 2": Layout(2, tensor=2, expert=2),
    "shard 2 x expert 2": Layout(2, shard=2, expert=2),
    "replicate 4": Layout(4),
    "replicate 2 x shard 2": Layout(4, shard=2),
    "shard 4": Layout(4, shard=4),
    "expert 4": Layout(4, expert=4),
    "expert 2 of 4": Layout(4, expert=2),
    "tensor 4": Layout(4, tensor=4),
    "tensor 2 x expert 2": Layout(4, tensor=2, expert=2),
    "tensor 2, expert 4 over both": Layout(4, tensor=2, expert=4),
    "shard 2 x expert 2, world 4": Layout(4, shard=2, expert=2),
    "shard 4 x expert 2, recompute": Layout(4, shard=4, expert=2, recompute=True),
    "tensor 2 x shard 2 x expert 2": Layout(4, tensor=2, shard=2, expert=2),
    "tensor 2 x shard 2 x expert 4, recompute": Layout(4, tensor=2, shard=2, expert=4, recompute=True),
    "tensor 4 x expert 2": Layout(4, tensor=4, expert=2),
}

CASES: dict[str, dict[str, Any]] = {
    "dropless, balance by sequence": {},
    "two micro-batches": {"micro_batches": 2},
    "drops by sequence, balance by batch": {"capacity_factor": 0.8, "balance_scope": Scope.batch},
    "drops by batch, two micro-batches": {
        "capacity_factor": 0.8,
        "capacity_scope": Scope.batch,
        "balance_scope": Scope.batch,
        "micro_batches": 2,
    },
    "tied, one dense layer, shared expert, top-1": {"tie_embeddings": True, "dense_first": 1, "shared_hidden": 16, "top_k": 1},
    "all tokens to one expert": {"top_k": 1, "equal_scores": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_gives_the_numbers_of_one_process(ranks, layout: Layout, case: str) -> None:
    expected = reference(case)
    parts = [train(layout, CASES[case])] if layout.world == 1 else ranks(layout.world, train, layout, CASES[case])
    for numbers, reference_numbers in zip(parts[0]["steps"], expected["steps"], strict=True):
        assert_equal(numbers, reference_numbers)
    for rank in parts[1:]:
        for numbers, of_rank_0 in zip(rank["steps"], parts[0]["steps"], strict=True):
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(numbers, of_rank_0, strict=True))
    for kind in ("gradients", "weights"):
        for name, value in assemble([part[kind] for part in parts]).items():
            assert_close(value, expected[kind][name], f"{kind} of {name}")


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_worth_comparing_with(case: str) -> None:
    expected = reference(case)
    first: StepNumbers = expected["steps"][0]
    assert all(gradient.abs().max() > 0 for name, gradient in expected["gradients"].items() if "experts" not in name)
    assert (first.counts_LE.amin(1) == 0).all(), "no expert without tokens"
    assert (first.balance_L > 0.99).all() and (first.z_L > 0).all()
    assert first.dropped_L.sum() > 0 or "capacity_factor" not in CASES[case]
    assert first.tokens < SEQUENCES * LENGTH


_references: dict[str, dict[str, Any]] = {}


def reference(case: str) -> dict[str, Any]:
    """One process, by case; weights and gradients are whole."""
    if case not in _references:
        result = train(Layout(1), CASES[case])
        _references[case] = {**result, **{kind: assemble([result[kind]]) for kind in ("gradients", "weights")}}
    return _references[case]


def train(layout: Layout, case: dict[str, Any]) -> dict[str, Any]:
    """Three optimizer steps on this rank: their numbers, the first step's gradients and the last weights, by name and piece."""
    case = dict(case)
    equal_scores = case.pop("equal_scores", False)
    micro_batches = case.pop("micro_batches", 1)
    parallel = build(layout, model_config(**case))
    (favour_one_expert if equal_scores else starve_expert)(parallel)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    steps, gradients = [], {}
    for step in range(STEPS):
        steps.append(train_step(parallel, optimizer, rows_of(parallel, step, micro_batches), lr=0.01, clip_norm=None))
        if step == 0:
            gradients = {name: (p.piece, gradient_of(p).clone()) for name, p in parallel.placed.items()}
    weights = {name: (p.piece, local(p.parameter).detach().clone()) for name, p in parallel.placed.items()}
    return {"steps": steps, "gradients": gradients, "weights": weights}


def model_config(balance_scope: Scope = Scope.sequence, **changes: Any) -> ModelConfig:
    model = {name: changes.pop(name) for name in ("tie_embeddings", "dense_first") if name in changes}
    capacity = CapacityConfig(factor=changes.pop("capacity_factor", None), scope=changes.pop("capacity_scope", Scope.sequence))
    moe = MoEConfig(
        experts=8,
        hidden=16,
        z_coefficient=0.01,
        balance=BalanceConfig(coefficient=0.05, scope=balance_scope),
        capacity=capacity,
        **changes,
    )
    return ModelConfig(layers=2, width=16, heads=4, kv_heads=4, hidden=24, vocabulary=VOCABULARY, init_std=0.3, moe=moe, **model)


def build(layout: Layout, config: ModelConfig) -> Parallel:
    with torch.device("meta"):
        model = Transformer(config, torch.float64)
    spread = ParallelConfig(tensor=layout.tensor, shard=layout.shard, expert=layout.expert, recompute=layout.recompute)
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


def rows_of(parallel: Parallel, step: int, micro_batches: int) -> list[Rows]:
    """This rank's rows: a micro-step of all ranks is a run of the global batch."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    targets = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    targets[torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.1] = -100
    data = parallel.mesh.data
    return [
        Rows(i.chunk(data.size)[data.rank], t.chunk(data.size)[data.rank])
        for i, t in zip(ids.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
    ]


def assemble(parts: list[dict[str, tuple[Piece, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Whole tensors from all ranks' pieces; every element must be there, and copies must agree."""
    wholes = {}
    for name in parts[0]:
        whole = torch.full(parts[0][name][0].shape, torch.nan, dtype=torch.float64)
        for piece, value in (part[name] for part in parts):
            target = Piece(*piece).cut(whole)
            known = ~target.isnan()
            assert torch.equal(target[known], value[known]), f"copies of {name} differ"
            target.copy_(value)
        assert not whole.isnan().any(), f"a part of {name} is on no rank"
        wholes[name] = whole
    return wholes


def assert_equal(numbers: StepNumbers, expected: StepNumbers) -> None:
    for field, value, reference_value in zip(StepNumbers._fields, numbers, expected, strict=True):
        if isinstance(value, int) or not value.is_floating_point():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(reference_value)), field
        else:
            assert_close(value, reference_value, field)


def assert_close(value: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{what}: relative difference {error:.2e}"
