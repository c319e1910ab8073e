"""The balance losses of DeepSeek-V2 (arXiv:2405.04434, eq. 23-31) and V3 (arXiv:2412.19437, eq. 17-20) as loops over tokens.

B sequences, S tokens of each, T valid tokens of a scope, E experts, G devices (groups of experts).
"""

import pytest
import torch
from tokenyard.moe.config import BalanceConfig, GroupScore, MoEConfig, RouterConfig, Scope, Score
from tokenyard.moe.router import Router
from tokenyard.moe.token_info import TokenInfo
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.loss import Losses, Totals, losses
from torch import Tensor

EXPERTS, DEVICES, MOST, TOP_K, SEQUENCES, LENGTH = 12, 4, 2, 3, 3, 10
SIZE = EXPERTS // DEVICES
SCOPES = pytest.mark.parametrize("scope", [Scope.sequence, Scope.batch])


def limited_choices(scores_E: list[float]) -> list[int]:
    """The top K experts among those of the M devices whose best expert scores highest (V2, section 2.2.2)."""
    best = sorted(range(DEVICES), key=lambda d: -max(scores_E[d * SIZE : (d + 1) * SIZE]))[:MOST]
    allowed = [e for e in range(EXPERTS) if e // SIZE in best]
    return sorted(allowed, key=lambda e: -scores_E[e])[:TOP_K]


def device_loss(s_TE: Tensor, choices: list[list[int]]) -> Tensor:
    """Eq. 26-28, by f of eq. 24 and P of eq. 25."""
    tokens, total = len(s_TE), torch.zeros((), dtype=s_TE.dtype)
    f = [EXPERTS / (TOP_K * tokens) * sum(e in chosen for chosen in choices) for e in range(EXPERTS)]
    p = [sum(s_TE[t, e] for t in range(tokens)) / tokens for e in range(EXPERTS)]
    for device in range(DEVICES):
        experts = range(device * SIZE, (device + 1) * SIZE)
        total = total + sum(f[e] for e in experts) / SIZE * sum(p[e] for e in experts)
    return total


def communication_loss(s_TE: Tensor, choices: list[list[int]]) -> Tensor:
    """Eq. 29-31: a token is sent to a device once, however many of its experts it chose."""
    tokens, total = len(s_TE), torch.zeros((), dtype=s_TE.dtype)
    for device in range(DEVICES):
        sent = sum(any(e // SIZE == device for e in chosen) for chosen in choices)
        p = sum(s_TE[t, e] for t in range(tokens) for e in range(device * SIZE, (device + 1) * SIZE)) / tokens
        total = total + DEVICES / (MOST * tokens) * sent * p
    return total


@SCOPES
@pytest.mark.parametrize(("which", "formula"), [("device", device_loss), ("communication", communication_loss)])
def test_v2_losses_of_devices(which: str, formula, scope: Scope) -> None:
    for seed in range(10):
        router = router_of(BalanceConfig(0.0, scope, **{f"{which}_coefficient": 0.7}), seed)
        logits_BSE, valid_BS = batch(seed)
        share = losses_of(router, logits_BSE, valid_BS)
        (gradient,) = torch.autograd.grad(share.objective, logits_BSE)
        parts = per_scope(logits_BSE.softmax(-1), valid_BS, scope)
        expected = sum(formula(s_TE, [limited_choices(row) for row in s_TE.tolist()]) for s_TE in parts) / len(parts)
        found = share.device_L if which == "device" else share.communication_L
        torch.testing.assert_close(found.squeeze(0), expected.detach(), rtol=1e-12, atol=0)
        (expected_gradient,) = torch.autograd.grad(0.7 * expected, logits_BSE)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)
        other = share.communication_L if which == "device" else share.device_L
        assert other == share.sequence_L == 0


def test_v2_losses_at_known_values() -> None:
    """The first experts of equal scores are chosen, all of the first device. Then all probability is on these experts as well."""
    router = router_of(BalanceConfig(0.0, device_coefficient=1.0, communication_coefficient=1.0), 0)
    even = losses_of(router, torch.zeros(1, 4, EXPERTS, dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(even.device_L.item(), 1.0)
    torch.testing.assert_close(even.communication_L.item(), 0.5, msg="of two devices that a token may reach it needs one")
    certain = torch.full((1, 4, EXPERTS), -50.0, dtype=torch.float64)
    certain[..., :3] = 50.0
    worst = losses_of(router, certain, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(worst.device_L.item(), float(DEVICES))
    torch.testing.assert_close(worst.communication_L.item(), DEVICES / MOST)


@pytest.mark.parametrize("by_scores", [True, False])
def test_v3_sequence_loss_counts_the_scores_or_the_choices(by_scores: bool) -> None:
    """Eq. 17-20. The choices follow the expert bias and groups of devices; the top K of s does not."""
    differ = 0
    for seed in range(10):
        balance = BalanceConfig(0.0, sequence_coefficient=0.3, sequence_by_scores=by_scores, bias_rate=0.01)
        router = router_of(balance, seed, score=Score.sigmoid, group_score=GroupScore.top2)
        bias_E = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(seed + 100)) * 0.3
        assert router.expert_bias is not None
        router.expert_bias.copy_(bias_E)
        logits_BSE, valid_BS = batch(seed)
        share = losses_of(router, logits_BSE, valid_BS)
        routed_BSK = router(logits_BSE, TokenInfo(valid_BS)).experts_TK.view(SEQUENCES, LENGTH, TOP_K)
        expected = torch.zeros((), dtype=torch.float64)
        for s_TE, chosen in zip(
            per_scope(logits_BSE.sigmoid(), valid_BS, Scope.sequence), per_scope(routed_BSK, valid_BS, Scope.sequence), strict=True
        ):
            tokens = len(s_TE)
            best = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[:TOP_K] for row in s_TE.tolist()]
            counted = best if by_scores else chosen.tolist()
            differ += sum(set(a) != set(b) for a, b in zip(best, chosen.tolist(), strict=True))
            for e in range(EXPERTS):
                f = EXPERTS / (TOP_K * tokens) * sum(e in row for row in counted)
                p = sum(s_TE[t, e] / s_TE[t].sum() for t in range(tokens)) / tokens
                expected = expected + f * p / SEQUENCES
        torch.testing.assert_close(share.sequence_L.squeeze(0), expected.detach(), rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(share.objective, logits_BSE)
        (expected_gradient,) = torch.autograd.grad(0.3 * expected, logits_BSE)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-15)
    assert differ > 100


def router_of(balance: BalanceConfig, seed: int, **router: object) -> Router:
    """A router whose input are the logits."""
    grouped = RouterConfig(groups=DEVICES, top_groups=MOST, **router)  # pyright: ignore[reportArgumentType]
    made = Router(EXPERTS, MoEConfig(EXPERTS, TOP_K, z_coefficient=0.0, router=grouped, balance=balance), torch.float64)
    torch.nn.init.eye_(made.get_parameter("weight"))
    return made


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits_BSE = torch.randn(SEQUENCES, LENGTH, EXPERTS, dtype=torch.float64, generator=generator).requires_grad_()
    return logits_BSE, torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.8


def losses_of(router: Router, logits_BSE: Tensor, valid_BS: Tensor) -> Losses:
    stats = router(logits_BSE, TokenInfo(valid_BS)).stats
    totals = Totals(int(valid_BS.sum()), len(valid_BS), 1)
    return losses(torch.zeros((), dtype=torch.float64), [stats], router.config, totals, build_mesh(ParallelConfig()))


def per_scope(x_BSE: Tensor, valid_BS: Tensor, scope: Scope) -> list[Tensor]:
    return [x[valid] for x, valid in zip(x_BSE, valid_BS, strict=True)] if scope is Scope.sequence else [x_BSE[valid_BS]]
