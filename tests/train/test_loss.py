"""The objective from its parts: formulas, coefficients, scopes, and what padding may not change."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tokenyard.data.batches import IGNORE
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig, Scope
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.vocabulary import head_loss
from tokenyard.train.loss import Losses, Totals, losses
from torch import Tensor

EXPERTS, LAYERS, VOCABULARY = 4, 2, 40


@pytest.mark.parametrize("scope", Scope)
def test_equals_the_formulas(scope: Scope) -> None:
    model, (ids, targets) = tiny(0.05, 0.01, scope), batch()
    share = losses_of(model, ids, targets)
    logits, stats = model(ids, targets != IGNORE, with_stats=True)
    torch.testing.assert_close(share.cross_entropy, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE))
    valid, probabilities = targets != IGNORE, router_probabilities(model, ids)
    for layer, (logits_BSE, p_BSE) in enumerate(probabilities):
        torch.testing.assert_close(share.z_L[layer], logits_BSE[valid].logsumexp(-1).square().mean())
        parts = zip(p_BSE, valid, strict=True) if scope is Scope.sequence else [(p_BSE.flatten(0, 1), valid.flatten())]
        values = [switch_loss(p[v]) for p, v in parts]
        torch.testing.assert_close(share.balance_L[layer], torch.stack(values).mean())
        assert torch.equal(share.counts_LE[layer], stats[layer].counts_BE.sum(0))
    expected = share.cross_entropy + 0.05 * share.balance_L.sum() + 0.01 * share.z_L.sum()
    torch.testing.assert_close(share.objective.detach(), expected)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("which", ["balance", "z"])
def test_gradients_are_linear_in_each_coefficient_and_reach_the_router(which: str, scope: Scope) -> None:
    ids, targets = batch()
    gradients = []
    for factor in (0.0, 1.0, 2.0):
        balance, z = (0.05 * factor, 0.01) if which == "balance" else (0.05, 0.01 * factor)
        model = tiny(balance, z, scope)
        losses_of(model, ids, targets).objective.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    none, once, twice = gradients
    for name, gradient in none.items():
        torch.testing.assert_close(twice[name] - gradient, 2 * (once[name] - gradient), rtol=0, atol=1e-15, msg=name)
    assert all((once[name] - none[name]).norm() > 1e-5 for name in none if "router" in name)


def test_reported_values_do_not_depend_on_the_coefficients() -> None:
    ids, targets = batch()
    without, with_both = (losses_of(tiny(c, c, Scope.sequence), ids, targets) for c in (0.0, 0.3))
    for field in ("cross_entropy", "balance_L", "z_L", "counts_LE"):
        assert torch.equal(getattr(without, field), getattr(with_both, field))
    assert torch.equal(without.objective.detach(), without.cross_entropy)
    assert (without.balance_L > 0).all() and (without.z_L > 0).all()


@pytest.mark.parametrize("scope", Scope)
def test_trailing_padding_changes_nothing_but_its_size(scope: Scope) -> None:
    """Tokens after the last counted target: neither their ids nor their number matter (dropless)."""
    ids, targets = batch()
    targets[:, -3:] = IGNORE
    expected = gradients_of(tiny(0.05, 0.01, scope), ids[:, :-3], targets[:, :-3])
    for last in (0, 7):
        found = gradients_of(tiny(0.05, 0.01, scope), torch.cat([ids[:, :-3], torch.full((3, 3), last)], 1), targets)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-14, msg=name)


def test_sequence_without_a_counted_target_has_no_balance_loss() -> None:
    ids, targets = batch()
    targets[1] = IGNORE
    share = losses_of(tiny(0.05, 0.01, Scope.sequence), ids, targets)
    others = losses_of(tiny(0.05, 0.01, Scope.sequence), ids[[0, 2]], targets[[0, 2]])
    torch.testing.assert_close(share.balance_L, others.balance_L * 2 / 3)


def test_dense_model_has_the_cross_entropy_alone() -> None:
    config = ModelConfig(layers=1, width=16, heads=2, kv_heads=1, hidden=8, vocabulary=VOCABULARY, moe=MoEConfig(experts=0))
    model, (ids, targets) = Transformer(config, torch.float64), batch()
    initialise(model, 1)
    share = losses_of(model, ids, targets)
    expected = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(share.objective, expected)
    assert share.counts_LE.numel() == share.balance_L.numel() == share.z_L.numel() == 0


def tiny(balance: float, z: float, scope: Scope) -> Transformer:
    moe = MoEConfig(experts=EXPERTS, hidden=8, balance=BalanceConfig(balance, scope), z_coefficient=z)
    config = ModelConfig(layers=LAYERS, width=16, heads=4, kv_heads=2, vocabulary=VOCABULARY, init_std=0.3, moe=moe)
    model = Transformer(config, torch.float64)
    initialise(model, 1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(VOCABULARY, (2, 3, 9), generator=generator)
    return ids, targets.masked_fill(torch.rand(3, 9, generator=generator) < 0.2, IGNORE)


def losses_of(model: Transformer, ids: Tensor, targets: Tensor) -> Losses:
    mesh = build_mesh(ParallelConfig())
    cross_entropy = partial(head_loss, targets=targets, ignore=IGNORE, axis=mesh.tensor)
    (summed,), stats = model(ids, targets != IGNORE, head_losses=[cross_entropy])
    totals = Totals(int((targets != IGNORE).sum()), len(ids), 1)
    return losses(summed, stats, model.config.moe, totals, mesh)


def gradients_of(model: Transformer, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    losses_of(model, ids, targets).objective.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def router_probabilities(model: Transformer, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Logits and probabilities of the router of each layer, from the inputs that its layer really gets."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(router: torch.nn.Module, inputs: tuple[Tensor, ...], _output: object) -> None:
        logits_BSE = (inputs[0] @ router.get_parameter("weight").T).detach()
        found.append((logits_BSE, logits_BSE.softmax(-1)))

    hooks = [block.moe.router.register_forward_hook(look) for block in model.blocks if block.moe is not None]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def switch_loss(p_TE: Tensor) -> Tensor:
    """E * sum over experts of (share of choices) * (mean probability)."""
    chosen_TK = p_TE.topk(2).indices
    shares = [(chosen_TK == expert).double().sum() / chosen_TK.numel() for expert in range(EXPERTS)]
    return EXPERTS * sum((share * p for share, p in zip(shares, p_TE.mean(0), strict=True)), torch.zeros(()))
