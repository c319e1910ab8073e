"""Dropped choices against a plain simulation, capacities computed by hand, and causality."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from tokenyard.moe.capacity import LocalScope, best_of_scope, keep_best, keep_earliest
from tokenyard.moe.capacity import capacity as capacity_of
from tokenyard.moe.config import CapacityConfig, DropPolicy, ModelConfig, MoEConfig, RouterConfig, Scope
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import BatchPosition, TokenInfo, build_token_info
from torch import Tensor

EXPERTS = 4


@pytest.mark.parametrize(
    ("factor", "tokens", "top_k", "experts", "capacity"),
    [
        (1.0, 8, 1, 4, 2),
        (1.0, 9, 1, 4, 3),
        (1.25, 8, 2, 4, 5),
        (1.25, 9, 2, 4, 6),
        (0.8, 10, 2, 8, 2),
        (2.0, 6, 1, 4, 3),
        (0.01, 6, 1, 4, 1),
        (1.1, 100, 1, 10, 11),
        (100.0, 6, 1, 4, 6),
    ],
)
def test_an_expert_takes_the_rounded_up_multiple_of_an_even_share(
    factor: float, tokens: int, top_k: int, experts: int, capacity: int
) -> None:
    """All tokens choose experts 0 .. k - 1."""
    experts_BSK = torch.arange(top_k).expand(1, tokens, top_k)
    config = MoEConfig(experts=experts, top_k=top_k, capacity=CapacityConfig(factor=factor))
    kept_BSK = kept(experts_BSK, None, config)
    assert kept_BSK[0].sum(0).tolist() == [capacity] * top_k
    assert kept_BSK[0, :capacity].all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("scope", Scope)
def test_drops_what_a_plain_simulation_drops(scope: Scope, factor: float, top_k: int, masked: bool) -> None:
    experts_BSK, valid_BS = random_choices(3, 10, top_k)
    config = MoEConfig(experts=EXPERTS, top_k=top_k, capacity=CapacityConfig(factor=factor, scope=scope))
    kept_BSK = kept(experts_BSK, valid_BS if masked else None, config)
    expected_BSK = simulate(experts_BSK, valid_BS if masked else torch.ones(3, 10, dtype=torch.bool), config)
    assert torch.equal(kept_BSK, expected_BSK)
    assert 0 < kept_BSK.sum() < kept_BSK.numel(), "the case drops some"


@pytest.mark.parametrize("scope", Scope)
def test_later_tokens_decide_nothing_about_earlier_ones(scope: Scope) -> None:
    config = MoEConfig(experts=EXPERTS, top_k=2, capacity=CapacityConfig(factor=0.9, scope=scope))
    experts_BSK, _ = random_choices(2, 8, 2)
    before_BSK = kept(experts_BSK, None, config)
    changed = 0
    for b in range(2):
        for s in range(8):
            other_BSK = experts_BSK.clone()
            other_BSK[b, s] = (other_BSK[b, s] + 1) % EXPERTS
            after_BSK = kept(other_BSK, None, config)
            assert torch.equal(after_BSK[b, :s], before_BSK[b, :s]) and torch.equal(after_BSK[:b], before_BSK[:b])
            changed += int((after_BSK != before_BSK).sum())
            if scope is Scope.sequence:
                assert torch.equal(after_BSK[b + 1 :], before_BSK[b + 1 :])
    assert changed > 0


def test_a_sequence_alone_has_the_same_drops_in_sequence_scope_only() -> None:
    experts_BSK, _ = random_choices(4, 9, 2)
    for scope, same in ((Scope.sequence, True), (Scope.batch, False)):
        config = MoEConfig(experts=EXPERTS, top_k=2, capacity=CapacityConfig(factor=0.7, scope=scope))
        alone_BSK = torch.cat([kept(experts_SK[None], None, config) for experts_SK in experts_BSK])
        assert torch.equal(alone_BSK, kept(experts_BSK, None, config)) == same


def test_only_training_drops_and_says_how_many() -> None:
    torch.manual_seed(0)
    router = Router(8, MoEConfig(experts=EXPERTS, top_k=2, capacity=CapacityConfig(factor=0.5)), torch.float32)
    torch.nn.init.normal_(router.weight)
    x_BSD, valid_BS = torch.randn(2, 12, 8), torch.rand(2, 12) < 0.8
    trained, evaluated = router.train()(x_BSD, TokenInfo(valid_BS)), router.eval()(x_BSD, TokenInfo(valid_BS))
    assert evaluated.kept_TK is None and evaluated.stats.dropped == 0
    assert trained.stats.dropped == 2 * valid_BS.sum() - trained.kept_TK.sum() > 0
    assert not trained.kept_TK[~valid_BS.flatten()].any()
    assert torch.equal(trained.stats.counts_BE, evaluated.stats.counts_BE), "counted before any is dropped"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])
def test_keeps_the_choices_of_highest_priority(scope: Scope, masked: bool) -> None:
    experts_BSK, valid_BS = random_choices(3, 10, 2)
    wanted_BSK = (valid_BS if masked else torch.ones(3, 10, dtype=torch.bool))[..., None].expand_as(experts_BSK)
    priority_BSE = torch.rand(3, 10, EXPERTS, generator=torch.Generator().manual_seed(1))
    kept_BSK = keep_best(experts_BSK, wanted_BSK, priority_BSE, 3, scope, LocalScope())
    for sequences in [[0], [1], [2]] if scope is Scope.sequence else [[0, 1, 2]]:
        asked = [
            (-priority_BSE[b, s, expert].item(), expert, (b, s, k))
            for b in sequences
            for s in range(10)
            for k, expert in enumerate(experts_BSK[b, s].tolist())
            if wanted_BSK[b, s, k]
        ]
        for expert in range(EXPERTS):
            best = {place for _, _, place in sorted(choice for choice in asked if choice[1] == expert)[:3]}
            found = {place for _, e, place in asked if e == expert and kept_BSK[place]}
            assert found == best
    assert not (kept_BSK & ~wanted_BSK).any() and kept_BSK.sum() < wanted_BSK.sum()


def test_equal_priorities_keep_the_earlier() -> None:
    experts_BSK, _ = random_choices(3, 10, 2)
    wanted_BSK, even_BSE = torch.ones_like(experts_BSK, dtype=torch.bool), torch.zeros(3, 10, EXPERTS)
    for scope in Scope:
        by_position = keep_earliest(experts_BSK, wanted_BSK, 2, EXPERTS, scope, LocalScope())
        assert torch.equal(keep_best(experts_BSK, wanted_BSK, even_BSE, 2, scope, LocalScope()), by_position)


def test_random_drops_are_even_over_positions_and_fresh_each_step() -> None:
    """Dropping by position would keep nothing of the second half."""
    config = MoEConfig(
        experts=2, top_k=1, capacity=CapacityConfig(factor=1.0, policy=DropPolicy.random), router=RouterConfig(bias=True)
    )
    router = Router(8, config, torch.float32)
    torch.nn.init.zeros_(router.get_parameter("weight"))
    torch.nn.init.zeros_(router.get_parameter("bias"))
    x_BSD, ids_BS = torch.randn(200, 16, 8), torch.zeros(200, 16, dtype=torch.int64)
    masks = [router(x_BSD, build_token_info(ids_BS, None, BatchPosition(step=step))).kept_TK.view(200, 16) for step in (1, 2)]
    for kept_BS in masks:
        assert (kept_BS.sum(1) == 8).all()
        assert (kept_BS.double().mean(0) - 0.5).abs().max() < 0.15
    assert 0.4 < (masks[0] == masks[1]).double().mean() < 0.6


def test_the_factor_follows_its_schedule() -> None:
    limits = CapacityConfig(factor=3.0, schedule=[5, 1.0, 10, 1.5, 20, 0])
    factors = [limits.factor_at(step) for step in (1, 4, 5, 9, 10, 19, 20, 1000)]
    assert factors == [3.0, 3.0, 1.0, 1.0, 1.5, 1.5, None, None]
    router = Router(8, MoEConfig(experts=EXPERTS, top_k=1, capacity=CapacityConfig(schedule=[2, 1.0, 3, 0])), torch.float32)
    torch.nn.init.zeros_(router.get_parameter("weight"))
    dropped = [int(router(torch.randn(1, 12, 8), TokenInfo(step=step)).stats.dropped) for step in (1, 2, 3)]
    assert dropped == [0, 9, 0]


def test_evaluation_has_a_factor_of_its_own_and_a_minimum() -> None:
    for limits, dropped in (
        (CapacityConfig(evaluation_factor=1.0), 9),
        (CapacityConfig(factor=1.0), 0),
        (CapacityConfig(evaluation_factor=1.0, minimum=5), 7),
    ):
        router = Router(8, MoEConfig(experts=EXPERTS, top_k=1, capacity=limits), torch.float32).eval()
        torch.nn.init.zeros_(router.get_parameter("weight"))
        assert router(torch.randn(1, 12, 8)).stats.dropped == dropped


@pytest.mark.parametrize("scope", Scope)
def test_padding_changes_rows_and_no_result(scope: Scope) -> None:
    limits = CapacityConfig(factor=1.1, scope=scope)
    plain, padded = (random_layer(MoEConfig(experts=EXPERTS, hidden=8, capacity=c)) for c in (limits, replace(limits, pad=True)))
    outcomes = []
    for layer in (plain, padded):
        x_BSD = torch.randn(3, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y_BSD, stats = layer(x_BSD)
        y_BSD.square().sum().backward()
        outcomes.append([y_BSD, stats.dropped, x_BSD.grad, *(parameter.grad for parameter in layer.parameters())])
        routing = layer.router(x_BSD)
        dispatched = layer.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        if layer is padded:
            rows = {Scope.sequence: 3 * 6, Scope.batch: 17, Scope.rank: 17}[scope]  # ceil(1.1 * 10 * 2 / 4), ceil(1.1 * 30 * 2 / 4)
            assert stats.dropped > 0
            assert dispatched.counts_E.tolist() == [rows] * EXPERTS
            assert (dispatched.tokens_RD == 0).all(1).sum() == EXPERTS * rows - routing.kept_TK.sum() > 0
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def random_layer(config: MoEConfig) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=8, moe=config), torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def kept(experts_BSK: Tensor, valid_BS: Tensor | None, config: MoEConfig) -> Tensor:
    wanted_BSK = torch.ones_like(experts_BSK, dtype=torch.bool) if valid_BS is None else valid_BS[..., None].expand_as(experts_BSK)
    scope, one = config.capacity.scope, LocalScope()
    assert config.capacity.factor is not None
    rows = capacity_of(config.capacity.factor, one.tokens(*experts_BSK.shape[:2], scope), config)
    return keep_earliest(experts_BSK, wanted_BSK, rows, config.experts, scope, one)


def random_choices(sequences: int, length: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Random choices in which the first experts are chosen more often."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(sequences, length, EXPERTS, generator=generator) + torch.tensor([0.6, 0.3, 0.0, 0.0])
    return noise.topk(top_k).indices, torch.rand(sequences, length, generator=generator) < 0.7


def simulate(experts_BSK: Tensor, valid_BS: Tensor, config: MoEConfig) -> Tensor:
    """Simulates one choice after the other; a single device is one rank and the whole batch."""
    sequences, length, top_k = experts_BSK.shape
    tokens = length if config.capacity.scope is Scope.sequence else sequences * length
    capacity = max(1, math.ceil(Fraction(str(config.capacity.factor)) * tokens * top_k / EXPERTS))
    kept_BSK, room = torch.zeros_like(experts_BSK, dtype=torch.bool), {}
    for b in range(sequences):
        if config.capacity.scope is Scope.sequence or b == 0:
            room = dict.fromkeys(range(EXPERTS), capacity)
        for s in range(length):
            for k, expert in enumerate(experts_BSK[b, s].tolist()):
                if valid_BS[b, s] and room[expert] > 0:
                    room[expert] -= 1
                    kept_BSK[b, s, k] = True
    return kept_BSK


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_decide_between_equal_tokens(dtype: torch.dtype) -> None:
    """On another layout equal tokens have scores that differ in the last bits; the earlier tokens are still taken."""
    scores_BSE = torch.rand(1, 1, EXPERTS, dtype=dtype, generator=torch.Generator().manual_seed(0)).expand(2, 10, EXPERTS)
    noise_BSE = torch.randint(-2, 3, scores_BSE.shape, generator=torch.Generator().manual_seed(1))
    noisy_BSE = scores_BSE * (1 + noise_BSE.to(dtype) * torch.finfo(dtype).eps)
    assert len(noisy_BSE[:, :, 0].unique()) > 1
    taken_BSE = best_of_scope(noisy_BSE, 7, Scope.batch, LocalScope())
    assert taken_BSE.flatten(0, 1).T.tolist() == EXPERTS * [7 * [True] + 13 * [False]]
