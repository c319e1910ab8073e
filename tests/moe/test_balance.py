"""The load-balance loss at its known values and against its formula."""

import torch
from tokenyard.moe.balance import balance_loss, squared_variation, update_expert_bias


def test_is_1_for_an_even_load_whatever_the_scores() -> None:
    torch.manual_seed(0)
    scores_E = torch.rand(8, dtype=torch.float64).softmax(0) * 24
    loss = balance_loss(torch.full((8,), 6), scores_E, torch.tensor(24), top_k=2)
    torch.testing.assert_close(loss, torch.tensor(1.0, dtype=torch.float64))


def test_is_the_number_of_experts_when_all_tokens_are_certain_of_one() -> None:
    certain_E = torch.tensor([0, 0, 24, 0, 0, 0, 0, 0])
    assert balance_loss(certain_E, certain_E.double(), torch.tensor(24), top_k=1) == 8


def test_equals_the_formula_for_each_leading_index() -> None:
    torch.manual_seed(0)
    counts, tokens = torch.randint(9, (2, 3, 4)), torch.randint(1, 30, (2, 3))
    scores = torch.rand(2, 3, 4, dtype=torch.float64)
    loss = balance_loss(counts, scores, tokens, top_k=2)
    for layer in range(2):
        for sequence in range(3):
            n = tokens[layer, sequence].item()
            parts = [
                c / (2 * n) * p / n for c, p in zip(counts[layer, sequence].tolist(), scores[layer, sequence].tolist(), strict=True)
            ]
            torch.testing.assert_close(loss[layer, sequence].item(), 4 * sum(parts), rtol=1e-14, atol=0)


def test_no_tokens_cost_nothing() -> None:
    loss = balance_loss(torch.zeros(4, dtype=torch.int64), torch.zeros(4, requires_grad=True), torch.tensor(0), top_k=2)
    assert loss == 0


def test_gradient_pushes_the_scores_of_crowded_experts_down() -> None:
    """d loss / d score of expert e = E * share of choices / tokens; the counts carry no gradient."""
    scores = torch.tensor([4.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    balance_loss(torch.tensor([7, 2, 1]), scores, torch.tensor(10), top_k=1).backward()
    torch.testing.assert_close(scores.grad, torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64) * 3 / 10)


def test_squared_variation_and_its_derivative_from_parts() -> None:
    """Every part has the value of the whole; the gradients of the parts' slopes add up to that of the whole."""
    torch.manual_seed(0)
    parts = [torch.rand(2, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    total = torch.stack(parts).sum(0)
    expected = total.var(-1, unbiased=False) / total.mean(-1).square()
    gradients = torch.autograd.grad(expected.sum(), parts)
    for part, gradient in zip(parts, gradients, strict=True):
        value, slope = squared_variation(total, part)
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(slope.sum(), part)[0], gradient, rtol=1e-12, atol=1e-15)


def test_squared_variation_is_0_when_even_and_experts_less_1_when_all_goes_to_one() -> None:
    for total, value in ((torch.full((8,), 3.0), 0.0), (torch.eye(8)[2] * 5, 7.0), (torch.zeros(8), 0.0)):
        torch.testing.assert_close(squared_variation(total, total).value.item(), value)


def test_expert_bias_moves_by_the_rate_towards_an_even_load() -> None:
    bias_E = torch.tensor([0.5, 0.5, 0.5, 0.5])
    update_expert_bias(bias_E, torch.tensor([9, 5, 1, 5]), 0.25)
    assert bias_E.tolist() == [0.25, 0.5, 0.75, 0.5]
    before = bias_E.clone()
    update_expert_bias(bias_E, torch.tensor([3, 3, 3, 3]), 0.25)
    assert torch.equal(bias_E, before)
