"""One optimizer step on one process: accumulation, recomputation, clipping, precision, and that everything learns."""

from typing import Any

import pytest
import torch
from tokenyard.data.batches import IGNORE
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope
from tokenyard.moe.model import Transformer
from tokenyard.moe.weight_cast import shared_casts
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig, Recompute
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train import step as step_module
from tokenyard.train.batch import Rows
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, StepNumbers, train_step
from torch import Tensor

EXPERTS, VOCABULARY, SEQUENCES, LENGTH = 4, 40, 4, 10


@pytest.mark.parametrize("capacity", [None, 0.7])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulation_changes_nothing(micro_batches: int, capacity: float | None) -> None:
    """Micro-batches with different numbers of counted targets; both scopes are by sequence."""
    whole, parts = build(capacity=CapacityConfig(capacity)), build(capacity=CapacityConfig(capacity))
    targets_in_parts = [(rows.targets != IGNORE).sum() for rows in batch(micro_batches)]
    assert len(set(map(int, targets_in_parts))) > 1
    expected, numbers = one_step(whole, batch(1)), one_step(parts, batch(micro_batches))
    assert (expected.dropped_L.sum() > 0) == (capacity is not None)
    assert_same_numbers(numbers, expected)
    assert_same_parameters(parts, whole)


@pytest.mark.parametrize("scope", [Scope.batch, Scope.rank])
def test_balance_by_batch_is_the_mean_over_micro_batches(scope: Scope) -> None:
    expected = [one_step(build(scope=scope), [rows]).balance_L for rows in batch(2)]
    assert not torch.allclose(*expected)
    torch.testing.assert_close(one_step(build(scope=scope), batch(2)).balance_L, torch.stack(expected).mean(0))


@pytest.mark.parametrize("recompute", [Recompute.block, Recompute.selective])
@pytest.mark.parametrize("capacity", [None, 0.7])
def test_recomputation_changes_nothing(capacity: float | None, recompute: Recompute) -> None:
    kept, recomputed = build(capacity=CapacityConfig(capacity)), build(recompute=recompute, capacity=CapacityConfig(capacity))
    expected, numbers = one_step(kept, batch(2)), one_step(recomputed, batch(2))
    assert torch.equal(numbers.counts_LE.sum(1), torch.tensor([2, 2]) * numbers.tokens), "each choice is counted once"
    assert_same_numbers(numbers, expected)
    assert_same_parameters(recomputed, kept)


@pytest.mark.parametrize(
    ("micro_batches", "recompute", "shared"),
    [(1, Recompute.none, 0), (2, Recompute.none, 1), (2, Recompute.block, 0), (2, Recompute.selective, 0)],
)
def test_micro_batches_share_casts(micro_batches: int, recompute: Recompute, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with recomputation, which keeps nothing."""
    entered = []
    monkeypatch.setattr(step_module, "shared_casts", lambda: entered.append(None) or shared_casts())
    one_step(build(torch.bfloat16, recompute=recompute), batch(micro_batches))
    assert len(entered) == shared


def test_recomputation_does_compute_again() -> None:
    calls = []
    for recompute in Recompute:
        parallel = build(recompute=recompute)
        count = [0]
        parallel.model.blocks[0].moe.router.register_forward_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        one_step(parallel, batch(1))
        calls.append(count[0])
    assert calls == [1 + recompute.repeats for recompute in Recompute] == [1, 2, 2, 1]


@pytest.mark.parametrize("share", [None, 0.25, 4.0])
def test_clipping_scales_down_to_the_norm_and_never_up(share: float | None) -> None:
    free, clipped = build(), build()
    norm = one_step(free, batch(1)).gradient_norm
    torch.testing.assert_close(norm, norm_of(free))
    limit = None if share is None else share * norm.item()
    assert torch.equal(one_step(clipped, batch(1), limit).gradient_norm, norm), "the norm before clipping is reported"
    torch.testing.assert_close(norm_of(clipped), norm if limit is None else norm.clamp(max=limit), rtol=1e-5, atol=0)
    factor = norm_of(clipped) / norm
    for name, parameter in clipped.model.named_parameters():
        torch.testing.assert_close(parameter.grad, free.model.get_parameter(name).grad * factor)


@pytest.mark.fault(14)
def test_every_parameter_learns() -> None:
    parallel = build(shared_hidden=8)
    before = {name: parameter.detach().clone() for name, parameter in parallel.model.named_parameters()}
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.0), parallel)
    losses = [train_step(parallel, optimizer, StepInput(batch(1), lr=0.01, clip_norm=1.0)).cross_entropy for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for name, parameter in parallel.model.named_parameters():
        changed = (parameter != before[name]).double().mean()
        assert changed == 1 if name != "embedding.weight" else changed > 0.4, f"{changed:.0%} of {name}"


def test_no_learning_rate_no_change() -> None:
    parallel = build()
    before = {name: parameter.detach().clone() for name, parameter in parallel.model.named_parameters()}
    train_step(parallel, build_optimizer(OptimizerConfig(), parallel), StepInput(batch(1), lr=0.0, clip_norm=1.0))
    assert all(torch.equal(parameter, before[name]) for name, parameter in parallel.model.named_parameters())


def test_gradients_of_the_last_step_are_forgotten() -> None:
    once, twice = build(), build()
    one_step(twice, batch(1), lr=0.0)
    assert torch.equal(one_step(once, batch(1)).gradient_norm, one_step(twice, batch(1)).gradient_norm)


def test_dense_model_and_a_batch_without_targets() -> None:
    parallel = build(experts=0)
    numbers = one_step(parallel, batch(2))
    assert numbers.counts_LE.numel() == 0 and numbers.cross_entropy > 0
    empty = [Rows(rows.ids, torch.full_like(rows.targets, IGNORE)) for rows in batch(1)]
    numbers = one_step(build(), empty)
    assert numbers.cross_entropy == 0 and numbers.gradient_norm == 0 and not numbers.counts_LE.any()


def test_bf16_trains_fp32_weights_to_nearly_the_same_losses() -> None:
    """Three steps: cross entropies within 1 %, gradient norms within 5 %, of fp32."""
    narrow, wide = build(torch.bfloat16), build(torch.float32)
    optimizers = [build_optimizer(OptimizerConfig(), parallel) for parallel in (narrow, wide)]
    for _ in range(3):
        found, expected = (
            train_step(p, o, StepInput(batch(2), 0.003, 1.0)) for p, o in zip((narrow, wide), optimizers, strict=True)
        )
        assert found.cross_entropy.item() == pytest.approx(expected.cross_entropy.item(), rel=0.01)
        assert found.gradient_norm.item() == pytest.approx(expected.gradient_norm.item(), rel=0.05)
    for name, parameter in narrow.model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert all(value.dtype == torch.float32 for value in optimizers[0].state[parameter].values()), name
        rounded = parameter.detach().bfloat16().float()
        assert "norm" in name or (rounded != parameter).double().mean() > 0.9, f"{name} has bf16 values"


def build(
    dtype: torch.dtype = torch.float64,
    recompute: Recompute = Recompute.none,
    experts: int = EXPERTS,
    scope: Scope = Scope.sequence,
    **changes: Any,
) -> Parallel:
    moe = MoEConfig(experts=experts, hidden=8, balance=BalanceConfig(0.05, scope), z_coefficient=0.01, **changes)
    config = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, hidden=8, vocabulary=VOCABULARY, init_std=0.3, moe=moe)
    with torch.device("meta"):
        model = Transformer(config, dtype)
    spread = ParallelConfig(recompute=recompute)
    parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"))
    initialise(parallel, seed=1)
    return parallel


def batch(micro_batches: int) -> list[Rows]:
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(VOCABULARY, (2, SEQUENCES, LENGTH), generator=generator)
    targets = targets.masked_fill(torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.3, IGNORE)
    return [Rows(i, t) for i, t in zip(ids.chunk(micro_batches), targets.chunk(micro_batches), strict=True)]


def one_step(parallel: Parallel, rows: list[Rows], clip_norm: float | None = None, lr: float = 0.01) -> StepNumbers:
    return train_step(parallel, build_optimizer(OptimizerConfig(), parallel), StepInput(rows, lr, clip_norm))


def norm_of(parallel: Parallel) -> Tensor:
    gradients = [parameter.grad.flatten() for parameter in parallel.model.parameters() if parameter.grad is not None]
    return torch.cat(gradients).double().norm()


def assert_same_numbers(numbers: StepNumbers, expected: StepNumbers) -> None:
    fields = [field for field in StepNumbers._fields if field != "global_flags"]
    for field, value, reference in [(field, getattr(numbers, field), getattr(expected, field)) for field in fields]:
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(reference), rtol=1e-12, atol=0, msg=field)


def assert_same_parameters(parallel: Parallel, expected: Parallel) -> None:
    for name, parameter in parallel.model.named_parameters():
        other = expected.model.get_parameter(name)
        torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=1e-14, msg=f"gradient of {name}")
        torch.testing.assert_close(parameter, other, rtol=0, atol=1e-8, msg=name)
