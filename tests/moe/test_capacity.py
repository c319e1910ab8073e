"""Which choices are dropped, against a plain simulation; the capacity itself by hand; no look at later tokens."""

import math
from fractions import Fraction

import pytest
import torch
from tokenyard.moe.capacity import OneDevice, keep_earliest
from tokenyard.moe.capacity import capacity as capacity_of
from tokenyard.moe.config import CapacityConfig, MoEConfig, Scope
from tokenyard.moe.router import Router
from tokenyard.moe.tokens import Tokens
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
    trained, evaluated = router.train()(x_BSD, Tokens(valid_BS)), router.eval()(x_BSD, Tokens(valid_BS))
    assert evaluated.kept_TK is None and evaluated.stats.dropped == 0
    assert trained.stats.dropped == 2 * valid_BS.sum() - trained.kept_TK.sum() > 0
    assert not trained.kept_TK[~valid_BS.flatten()].any()
    assert torch.equal(trained.stats.counts_BE, evaluated.stats.counts_BE), "counted before any is dropped"


def kept(experts_BSK: Tensor, valid_BS: Tensor | None, config: MoEConfig) -> Tensor:
    wanted_BSK = torch.ones_like(experts_BSK, dtype=torch.bool) if valid_BS is None else valid_BS[..., None].expand_as(experts_BSK)
    scope, one = config.capacity.scope, OneDevice()
    assert config.capacity.factor is not None
    rows = capacity_of(config.capacity.factor, one.tokens(*experts_BSK.shape[:2], scope), config)
    return keep_earliest(experts_BSK, wanted_BSK, rows, config.experts, scope, one)


def random_choices(sequences: int, length: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Uneven: the first experts are chosen more often."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(sequences, length, EXPERTS, generator=generator) + torch.tensor([0.6, 0.3, 0.0, 0.0])
    return noise.topk(top_k).indices, torch.rand(sequences, length, generator=generator) < 0.7


def simulate(experts_BSK: Tensor, valid_BS: Tensor, config: MoEConfig) -> Tensor:
    """One choice after the other; a device alone is its own rank and the whole batch."""
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
