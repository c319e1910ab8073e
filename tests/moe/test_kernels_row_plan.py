"""The Triton kernels of the plan of rows give what the stable sort gives, to the bit. They run in Triton's interpreter."""

import pytest
import torch
from tokenyard.moe.device import dry_run
from tokenyard.moe.dispatch import count_rows, plan_choices
from tokenyard.moe.kernels import row_plan
from tokenyard.moe.kernels.operators import CHUNK
from tokenyard.moe.kernels.row_plan import EXPERTS

pytestmark = pytest.mark.usefixtures("bounded_kernels")

SHAPES = {  # tokens, experts, choices of each
    "no token": (0, 4, 2),
    "one token": (1, 1, 1),
    "a full chunk": (CHUNK // 4, 60, 4),
    "two chunks, most experts empty": (40, 512, 8),
    "a program for the dropped alone": (7, EXPERTS - 1, 2),
    "two programs": (7, EXPERTS + 1, 2),
}
CASES = {  # share of the choices that are kept, rows of padding of the fullest expert
    "dropless": (None, None),
    "half dropped": (0.5, None),
    "half dropped, padded": (0.5, 3),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_plan_is_that_of_the_stable_sort(shape: tuple[int, int, int], case: tuple[float | None, int | None]) -> None:
    compare_plans(*shape, *case)


@pytest.mark.parametrize("case", [(None, 0), (0.0, None), (0.0, 1), (1.0, 0)], ids=str)
def test_plans_without_padding_or_rows(case: tuple[float | None, int | None]) -> None:
    compare_plans(9, 5, 2, *case)


def test_more_chunks_than_a_program_scans_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_plan, "SCANNED", 2)
    compare_plans(3 * CHUNK - 1, 3, 1, None, None)


def compare_plans(tokens: int, experts: int, top_k: int, keep: float | None, padding: int | None) -> None:
    """With few experts all have rows, with many some are empty. In a dry run, the rows of dropped choices are not cut off."""
    torch.manual_seed(tokens)
    experts_TK = torch.rand(tokens, experts).square().add(torch.linspace(0, 1, experts)).topk(top_k).indices
    if keep is not None:
        experts_TK = experts_TK.masked_fill(torch.rand(tokens, top_k) >= keep, experts)
    padded_rows = None if padding is None else int(count_rows(experts_TK, experts).counts_E.max()) + padding
    expected = plan_choices(experts_TK, experts, padded_rows, dropping=keep is not None)
    with dry_run("cuda") as dry:
        found = plan_choices(experts_TK, experts, padded_rows, dropping=keep is not None)
    assert dry.waits == ({"kept choices": 1} if keep is not None and padding is None else {})
    assert not found.token_R[len(expected.token_R) :].any()
    found = found._replace(token_R=found.token_R[: len(expected.token_R)])
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=0, msg=name)
