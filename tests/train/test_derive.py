"""precision=auto and log.every=null are resolved once, when a rank starts, and stay the same on another machine."""

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_facts
from tokenyard.moe.linear import linear, wide_linear
from tokenyard.parallel.process_group import pick_device
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, ConfigError, Precision
from tokenyard.train.config.serialize import config_from_plain
from tokenyard.train.derive import derive, set_products
from tokenyard.train.load import open_checkpoint, open_for_evaluation
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run
from tokenyard.train.setup import open_session

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def products_as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def configured(folder: Path, *overrides: str) -> Config:
    words = [
        *TINY_RUN,
        "steps=2",
        "evaluate.every=0",
        "sample.tokens=0",
        f"run.dir={folder / 'run'}",
        f"data.cache={folder / 'cache'}",
    ]
    return compose([*words, *overrides])


@pytest.mark.parametrize(
    ("words", "device", "saved", "precision", "every", "source"),
    [
        ("", CPU, None, "fp32", 1, "the default on a CPU"),
        ("", CUDA, None, "bf16", 10, "the default on a GPU"),
        ("", CPU, "bf16", "bf16", 1, "that of the checkpoint"),
        ("", CUDA, "fp32", "fp32", 10, "that of the checkpoint"),
        ("", CUDA, "auto", "bf16", 10, "the default on a GPU"),
        ("precision=fp32 log.every=3", CUDA, "bf16", "fp32", 3, "as set"),
        ("precision=bf16", CPU, None, "bf16", 1, "as set"),
    ],
)
def test_what_is_left_open_follows_from_checkpoint_and_device(
    words: str, device: torch.device, saved: str | None, precision: str, every: int, source: str
) -> None:
    config = compose(words.split())
    assert derive(config, device, saved) == source
    assert (config.precision, config.log.every) == (Precision[precision], every)
    assert derive(config, CPU) == "as set"


def test_a_machine_with_a_gpu_trains_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = compose([])
    derive(config, pick_device(config.device.value))
    assert config.precision is Precision.bf16


@pytest.mark.parametrize(
    ("words", "device", "products", "warned"),
    [
        ("", CPU, "medium", False),
        ("precision=fp32", CPU, "medium", False),
        ("", CUDA, "highest", False),
        ("precision=fp64", CUDA, "highest", False),
        ("precision=fp32", CUDA, "high", True),
        ("precision=fp32 tf32=false", CUDA, "highest", True),
    ],
)
def test_tf32_is_for_fp32_on_a_gpu_which_is_warned_of(
    words: str, device: torch.device, products: str, warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("tokenyard"), "propagate", True)
    torch.set_float32_matmul_precision("medium")
    config = compose(words.split())
    set_products(config, device, derive(config, device))
    assert torch.get_float32_matmul_precision() == products
    said = {record.getMessage().partition(":")[0] for record in caplog.records}  # twice in a process whose logger had a handler
    assert said == ({"precision=fp32 (as set)"} if warned else set())


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_router_multiplies_with_all_bits_of_fp32_where_others_take_tf32(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: a double of the product records its type."""
    seen: list[str] = []

    def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return torch.matmul(left, right)

    def router(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return wide_linear(x, weight, torch.float32)

    x_BSD, weight_ED = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(router(x_BSD, weight_ED).square().sum(), (x_BSD, weight_ED))
    call = torch.compile(router, fullgraph=True, backend="aot_eager") if compiled else router
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    found = torch.autograd.grad(call(x_BSD, weight_ED).square().sum(), (x_BSD, weight_ED))
    assert seen == ["highest"] * 3
    assert torch.get_float32_matmul_precision() == "high"
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr("tokenyard.moe.linear.F.linear", lambda x, weight, bias=None: product(x, weight.T))
    linear(x_BSD, weight_ED)
    assert seen[3:] == ["high"]


def test_all_that_a_run_writes_has_the_value(tmp_path: Path) -> None:
    assert run(configured(tmp_path)) == 0
    written = (tmp_path / "run" / "config.yaml").read_text().splitlines()
    assert "precision: fp32" in written and "  every: 1" in written
    kept = config_from_plain(read_facts(tmp_path / "run" / "checkpoints" / "step_00000002")["config"])
    assert (kept.precision, kept.log.every) == (Precision.fp32, 1)


def test_a_run_keeps_the_precision_of_its_checkpoint(tmp_path: Path) -> None:
    """Like a run that started on a GPU and resumes without one; generate and evaluate do the same."""
    run_folder = tmp_path / "run"
    assert run(configured(tmp_path, "precision=bf16")) == 0
    with closing(open_session(configured(tmp_path, "steps=4"), CPU)) as session:
        assert session.config.precision is Precision.bf16
        assert session.parallel.model.activations == torch.bfloat16
        assert session.precision_from == "that of the checkpoint"
    assert open_checkpoint(run_folder, CPU).model.activations == torch.bfloat16
    assert open_for_evaluation(str(run_folder), []).parallel.model.activations == torch.bfloat16
    assert open_for_evaluation(str(run_folder), ["precision=auto"]).parallel.model.activations == torch.float32
    (changed,) = [event for event in read_journal(run_folder / "events.jsonl") if event["event"] == "settings_changed"]
    assert list(changed["changed"]) == ["steps"]
    with closing(open_session(configured(tmp_path, "steps=4", "precision=fp32"), CPU)):
        pass
    *_, changed = [event for event in read_journal(run_folder / "events.jsonl") if event["event"] == "settings_changed"]
    assert changed["changed"]["precision"] == {"before": "bf16", "now": "fp32"}


def test_a_kept_precision_has_to_obey_the_rules(tmp_path: Path) -> None:
    assert run(configured(tmp_path, "precision=fp64")) == 0
    with pytest.raises(ConfigError, match="precision=fp64: must be fp32 or bf16 with engine=deepspeed"):
        open_session(configured(tmp_path, "engine=deepspeed"), CPU)
