"""GShard against algorithm 1 of its paper (Lepikhin et al. 2020), written as its loops over tokens.

B sequences, S tokens of each, T tokens of a group, E experts.
"""

from typing import NamedTuple

import pytest
import torch
from tokenyard.moe.config import BalanceConfig, CapacityConfig, DropPolicy, MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import BatchPosition, Purpose, TokenInfo, build_token_info, layer_keys, random_uniform
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.loss import Losses, Totals, losses
from torch import Tensor

EXPERTS, SEQUENCES, LENGTH, BATCHES = 4, 4, 12, 240
BATCH_SCOPE = Scope.batch


class Group(NamedTuple):
    """The outcome of algorithm 1 for a group."""

    weights_TE: Tensor
    loss: float
    lost_firsts: int


def algorithm_1(gates_TE: Tensor, draws_T: list[float], rows: int) -> Group:
    """The lines of the paper, in its order; `gates_TE` is the softmax of line 2. Line 22 counts seconds that are not drawn, too."""
    tokens, experts = gates_TE.shape
    taken, weights_TE, lost = [0] * experts, torch.zeros_like(gates_TE), 0
    mean_gate = gates_TE.mean(0).tolist()
    top_two = [sorted(range(experts), key=lambda e: -row[e])[:2] for row in gates_TE.tolist()]
    for s, (first, second) in enumerate(top_two):
        both = gates_TE[s, first] + gates_TE[s, second]
        if taken[first] < rows:
            weights_TE[s, first] = gates_TE[s, first] / both
        else:
            lost += 1
        taken[first] += 1
    loss = sum(taken[e] / tokens * mean_gate[e] for e in range(experts)) / experts
    for s, (first, second) in enumerate(top_two):
        share = float(gates_TE[s, second] / (gates_TE[s, first] + gates_TE[s, second]))
        if taken[second] < rows and 2 * share > draws_T[s]:
            weights_TE[s, second] = share
        taken[second] += 1
    return Group(weights_TE, loss, lost)


@pytest.mark.parametrize(
    ("scope", "groups"), [(Scope.sequence, 1), (BATCH_SCOPE, 1), (BATCH_SCOPE, 2), (BATCH_SCOPE, 6), (BATCH_SCOPE, 16)]
)
def test_weights_drops_and_loss_are_those_of_algorithm_1(scope: Scope, groups: int) -> None:
    """Groups of 48, 24, 8 and 3 tokens: they join sequences, begin and end inside of them, or divide them."""
    drops = lost_to_capacity = 0
    parts = SEQUENCES if scope is Scope.sequence else groups
    for batch in range(BATCHES):
        logits_BSE = crowded(batch)
        found_BSE, share, tokens = route(config_of(scope, groups), logits_BSE, batch)
        draws_BS = random_uniform(keys_of(tokens), 1, Purpose.second_expert).view(parts, -1)
        gates_GTE = logits_BSE.softmax(-1).view(parts, -1, EXPERTS)
        rows = gates_GTE.shape[1] * 2 // EXPERTS + (gates_GTE.shape[1] * 2 % EXPERTS > 0)
        expected = [algorithm_1(gates, draws.tolist(), rows) for gates, draws in zip(gates_GTE, draws_BS, strict=True)]
        expected_BSE = torch.stack([group.weights_TE for group in expected]).view_as(found_BSE)
        torch.testing.assert_close(found_BSE, expected_BSE, rtol=1e-12, atol=0, msg=f"batch {batch}")
        loss = sum(group.loss for group in expected) / parts * EXPERTS**2
        torch.testing.assert_close(share.balance_L.item(), loss, rtol=1e-12, atol=0)
        drops += int(share.dropped_L)
        lost_to_capacity += sum(group.lost_firsts for group in expected)
    assert drops > BATCHES and lost_to_capacity > 0, "the batches are crowded"


def test_no_first_choice_is_lost_to_a_second_one() -> None:
    """All tokens of the first half choose expert 1 second, all of the second half first: token by token, the seconds would win."""
    logits_BSE = torch.zeros(1, 12, EXPERTS, dtype=torch.float64)
    logits_BSE[:, :6, 0], logits_BSE[:, :6, 1] = 3.0, 2.9
    logits_BSE[:, 6:, 1], logits_BSE[:, 6:, 2] = 3.0, 2.9
    found_BSE, _, _ = route(config_of(Scope.sequence, 1), logits_BSE, 0)
    assert (found_BSE[0, :, 1] > 0).tolist() == [False] * 6 + [True] * 6


def test_the_gradient_of_the_loss_reaches_the_scores_of_each_group() -> None:
    """d l_aux / d g = c_e / T**2 of the token's own group, times E and over the groups."""
    logits_BSE = crowded(3)
    router, tokens = router_of(config_of(BATCH_SCOPE, 6)), tokens_of(3)
    router(logits_BSE, tokens)
    scores_BSE = logits_BSE.softmax(-1).requires_grad_()
    firsts = torch.nn.functional.one_hot(scores_BSE.detach().argmax(-1), EXPERTS).double().view(6, 8, EXPERTS)
    (EXPERTS * (firsts.mean(1) * scores_BSE.view(6, 8, EXPERTS).mean(1)).sum(-1).mean()).backward()
    share = losses_of(router(logits_BSE, tokens).stats, router.config)
    (gradient,) = torch.autograd.grad(share.objective, router.get_parameter("weight"))
    probabilities, upstream = scores_BSE.detach(), scores_BSE.grad
    assert upstream is not None
    logit_gradient = probabilities * (upstream - (upstream * probabilities).sum(-1, keepdim=True))
    expected = torch.einsum("bse,bsd->ed", logit_gradient, logits_BSE)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-15)


def test_other_selections_still_place_token_by_token() -> None:
    config = config_of(Scope.sequence, 1)
    config.router.selection = Selection.top_k
    logits_BSE = torch.zeros(1, 12, EXPERTS, dtype=torch.float64)
    logits_BSE[:, :6, 0], logits_BSE[:, :6, 1] = 3.0, 2.9
    logits_BSE[:, 6:, 1], logits_BSE[:, 6:, 2] = 3.0, 2.9
    found_BSE, _, _ = route(config, logits_BSE, 0)
    assert (found_BSE[0, :, 1] > 0).tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("policy", [DropPolicy.position, DropPolicy.priority, DropPolicy.probability])
def test_groups_keep_what_each_would_keep_alone(policy: DropPolicy) -> None:
    """Whatever the policy; with 48 tokens in 5 groups the last one has 8."""
    config = MoEConfig(EXPERTS, 2, capacity=CapacityConfig(factor=0.7, scope=BATCH_SCOPE, groups=5, policy=policy))
    alone = MoEConfig(EXPERTS, 2, capacity=CapacityConfig(factor=0.7, scope=BATCH_SCOPE, policy=policy))
    logits_TE = crowded(1).flatten(0, 1)
    whole_TE = route(config, logits_TE.view(SEQUENCES, LENGTH, EXPERTS), 0)[0].flatten(0, 1)
    alone.capacity.minimum = 4  # ceil(0.7 * 10 * 2 / 4), also for the short group
    parts = [route(alone, part.unsqueeze(0), 0)[0].squeeze(0) for part in logits_TE.split(10)]
    torch.testing.assert_close(whole_TE, torch.cat(parts))
    assert (whole_TE > 0).sum() < 2 * len(whole_TE)


def config_of(scope: Scope, groups: int) -> MoEConfig:
    return MoEConfig(
        EXPERTS,
        2,
        z_coefficient=0.0,
        router=RouterConfig(selection=Selection.gshard),
        balance=BalanceConfig(1.0, scope),
        capacity=CapacityConfig(factor=1.0, scope=scope, groups=groups),
    )


def crowded(batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    logits_BSE = torch.randn(SEQUENCES, LENGTH, EXPERTS, dtype=torch.float64, generator=generator)
    return logits_BSE + torch.tensor([1.0, 0.6, 0.0, 0.0])


def route(config: MoEConfig, logits_BSE: Tensor, step: int) -> tuple[Tensor, Losses, TokenInfo]:
    """Returns the combine weights (B, S, E) of what is dispatched, and the losses."""
    tokens = build_token_info(torch.zeros(logits_BSE.shape[:2], dtype=torch.int64), None, BatchPosition(step=step))
    routing = router_of(config)(logits_BSE, tokens)
    assert routing.kept_TK is not None
    weights_TK = (routing.weights_TK * routing.kept_TK).detach()
    found_TE = torch.zeros(len(weights_TK), EXPERTS, dtype=torch.float64).scatter(1, routing.experts_TK, weights_TK)
    return found_TE.view_as(logits_BSE), losses_of(routing.stats, config), tokens


def router_of(config: MoEConfig) -> Router:
    """A router whose input are the logits."""
    router = Router(EXPERTS, config, torch.float64)
    torch.nn.init.eye_(router.get_parameter("weight"))
    return router


def losses_of(stats, config: MoEConfig) -> Losses:
    sequences, constant = len(stats.tokens_B), torch.zeros((), dtype=torch.float64)
    return losses(constant, [stats], config, Totals(int(stats.tokens_B.sum()), sequences, 1), build_mesh(ParallelConfig()))


def tokens_of(step: int) -> TokenInfo:
    return build_token_info(torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64), None, BatchPosition(step=step))


def keys_of(tokens: TokenInfo) -> Tensor:
    """The keys that the router of layer 0 draws by."""
    return layer_keys(torch.empty(SEQUENCES, LENGTH, EXPERTS), tokens)
