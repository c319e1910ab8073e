"""The comparisons of `make gpu` pass for the code as it is, and fail for code that is wrong."""

import io
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenyard.bench.gpu import exchanges, presets, products, saves, waits
from tokenyard.bench.gpu.choices import ChoiceLog, record_choices, replay_choices
from tokenyard.bench.gpu.presets import preset, tiny_presets
from tokenyard.bench.gpu.recorder import Recorder, Unavailable
from tokenyard.bench.gpu.row_error import worst_matrix, worst_row
from tokenyard.checkpoint.host_staging import HostStaging
from tokenyard.moe import experts as experts_module
from tokenyard.moe import router
from tokenyard.moe.config import MoEConfig
from tokenyard.moe.device import dry_run
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, Precision
from torch import Tensor

CPU = torch.device("cpu")


def told(part: Callable[[Recorder], Any]) -> list[dict[str, Any]]:
    """The records of a part."""
    out = io.StringIO()
    part(Recorder(out, CPU, "tiny", 100.0))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def failed(records: list[dict[str, Any]]) -> list[str]:
    """The names of the checks that failed."""
    return [one["name"] for one in records if one["kind"] == "check" and not one["ok"]]


def compared(name: str) -> list[dict[str, Any]]:
    return told(lambda recorder: presets.compare(recorder, name, presets.small(preset(name))))


@pytest.mark.parametrize("name", tiny_presets())
def test_models_are_read_as_hydra_reads_them(name: str) -> None:
    assert preset(name) == compose([f"model={name}"]).model


def test_worst_row_sees_one_row() -> None:
    expected = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    wrong = expected.clone()
    wrong[7] = 0.0
    assert worst_row(expected, expected) == 0.0 and worst_row(wrong, expected) > 0.3
    assert worst_row(expected * torch.nan, expected) == worst_row(expected[:99], expected) == float("inf")
    assert worst_row(torch.empty(0, 8), torch.empty(0, 8)) == 0.0
    assert worst_matrix(expected.view(4, 25, 8), expected.view(4, 25, 8)) == 0.0


@pytest.mark.parametrize("name", ["tiny_deepseek_v3", "tiny_gpt_oss", "tiny_expert_choice"])
def test_a_model_passes(name: str) -> None:
    records = compared(name)
    assert failed(records) == []
    assert {one["name"].split(", ", 1)[1] for one in records} == {
        f"{precision}, {column}"
        for precision in ("fp32", "bf16")
        for column in ("outputs", "losses", "norm", "gradients", "weights", "counts", "choices")
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """In the precision that is compared alone; the reference is right."""
    narrow = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    real, sums = experts_module.activate, experts_module.sum_rows

    def swapped(activation: Any, x: Tensor, out: Tensor | None = None) -> Tensor:
        return real(activation, x.roll(x.shape[-1] // 2, -1) if x.dtype == narrow else x, out)

    def dropped(y_RD: Tensor, *plan: Any) -> Tensor:
        """The first token's rows are left out of its sum."""
        sums_TD = sums(y_RD, *plan)
        return torch.cat([torch.zeros_like(sums_TD[:1]), sums_TD[1:]]) if y_RD.dtype == narrow else sums_TD

    monkeypatch.setattr(experts_module, "activate", swapped)
    assert f"tiny_mixtral, {precision}, outputs" in failed(compared("tiny_mixtral"))
    monkeypatch.setattr(experts_module, "activate", real)
    monkeypatch.setattr(experts_module, "sum_rows", dropped)
    assert f"tiny_mixtral, {precision}, outputs" in failed(compared("tiny_mixtral"))


def test_wrong_choices_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the router itself would choose the least likely experts; the numbers are those of the reference's choices anyway."""
    choose_experts, observe, turned = router.choose_experts, presets.observe, {"now": False}

    def observing(config: Config, *rest: Any, **named: Any) -> Any:
        turned["now"] = config.precision is Precision.fp32
        return observe(config, *rest, **named)

    monkeypatch.setattr(presets, "observe", observing)
    monkeypatch.setattr(
        router, "choose_experts", lambda ranked_BSE, *rest: choose_experts(-ranked_BSE if turned["now"] else ranked_BSE, *rest)
    )
    assert failed(compared("tiny_olmoe")) == ["tiny_olmoe, fp32, choices"]


@pytest.mark.parametrize("records_kernels", [False, True])
def test_the_kernels_of_the_router_take_choices_of_another_run(records_kernels: bool) -> None:
    """The second run would choose the least likely experts. Either run may have kernels."""
    made, x_BSD, choices = router.Router(8, MoEConfig(6, 2), torch.float32), torch.randn(1, 5, 8), ChoiceLog()
    assert made.weight is not None
    torch.nn.init.normal_(made.weight)
    with dry_run("cuda" if records_kernels else "cpu"), record_choices(choices):
        expected = made(x_BSD)
    own = ChoiceLog(choices.made)
    with dry_run("cuda"), replay_choices(own):
        assert torch.equal(made(x_BSD).experts_TK, expected.experts_TK)
        assert own.different == 0 and own.compared == 5
    own = ChoiceLog(choices.made)
    with dry_run("cuda"), replay_choices(own):
        found = made(-x_BSD)
    assert torch.equal(found.experts_TK, expected.experts_TK) and own.different == 5 and own.gap > 0.1
    torch.testing.assert_close(found.weights_TK.sum(1), torch.ones(5))


def test_products_pass() -> None:
    records = told(products.run)
    assert failed(records) == []
    names = {one["name"] for one in records}
    assert {"experts without rows, geglu, empty, bf16", "grouped_mm, single rows, fp32", "experts, relu, no rows, bf16"} <= names


def test_garbage_of_empty_groups_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    real = experts_module.grouped_outer

    def garbage(left_RN: Tensor, right_RK: Tensor, ends_E: Tensor) -> Tensor:
        product = real(left_RN, right_RK, ends_E)
        product[torch.diff(ends_E, prepend=ends_E.new_zeros(1)) == 0] += 1e-30
        return product

    monkeypatch.setattr(products, "grouped_outer", garbage)
    assert "grouped_outer of empty groups, empty, bf16" in failed(told(products.run))


def test_a_world_of_one_passes() -> None:
    records = told(exchanges.run)
    assert failed(records) == []
    names = {one["name"].partition(",")[0] for one in records}
    assert {"gather exchange", "hierarchical exchange", "plain exchange in 2 chunks", "all-to-all of nothing"} <= names


def test_waits_are_those_that_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    found = waits.waits_of(exchanges.MODEL, CPU, None)
    assert dict(found.named) == {"flags, loss and norm": 1} and found.hidden == {} and found.seen.total() == 1
    logsumexp = Tensor.logsumexp

    def reading(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        assert x.isfinite().all().item()
        return logsumexp(x, *rest, **named)

    monkeypatch.setattr(Tensor, "logsumexp", reading)  # of the router's logits, for its z-loss
    read = waits.waits_of(exchanges.MODEL, CPU, None)
    assert read.named == found.named and sum(read.hidden.values()) >= 2  # of two layers


def test_the_table_of_waits_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "performance.md"
    monkeypatch.setattr(waits, "ROOT", tmp_path)
    page.write_text("# Performance\n\n| with | place | a step | a pass |\n")
    assert waits.listed_waits() is None
    rows = "| always | flags, loss and norm | 1 | 0 |\n| capacity | kept choices | 0 | 1 |"
    page.write_text(
        f"{waits.HEADING}\n\n| with | place | a step | a pass |\n| --- | --- | ---: | ---: |\n{rows}\n\n## More\n\n| x |\n"
    )
    listed = waits.listed_waits()
    assert listed == [waits.Listed("flags, loss and norm", 1, 0), waits.Listed("kept choices", 0, 1)]
    for names, wrong in [
        ({"flags, loss and norm": 1, "kept choices": 2}, []),
        ({"kept choices": 1, "totals": 1}, ["kept choices", "totals"]),
    ]:
        found = waits.Waits(Counter(names), Counter())
        records = told(lambda recorder, found=found: waits.report_waits(recorder, "m", found, exchanges.MODEL, listed))
        assert failed(records) == [f"m: {place}" for place in wrong]


def test_saves_pass_and_a_garbled_one_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    config = saves.configured("tiny", Precision.fp32, tmp_path)

    def compare(recorder: Recorder) -> None:
        saves.check_async_save(recorder, config, CPU)

    assert failed(told(compare)) == []
    real = HostStaging.copy

    def garbled(*call: Any) -> Any:
        copied = real(*call)
        next(iter(copied.values())).tensor.flatten()[:1].zero_()
        return copied

    monkeypatch.setattr(HostStaging, "copy", garbled)
    assert len(failed(told(compare))) == 3


def test_resume_is_bit_for_bit(tmp_path: Any) -> None:
    def compare(recorder: Recorder) -> None:
        saves.check_resume(recorder, saves.configured("tiny", Precision.bf16, tmp_path), CPU)

    assert failed(told(compare)) == []


def test_without_omegaconf_saves_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saves, "has", lambda package: package != "omegaconf")
    with pytest.raises(Unavailable, match="omegaconf is not installed"):
        told(saves.run)
