"""checkpoint.upcycle: training starts from a dense model as a Mixture of Experts, on any layout, and computes the same at first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from init_runs import EXPERTS, configured, opened, their_loss, trained
from tokenyard.checkpoint.store import read_whole
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.upcycle import Upcycle
from tokenyard.train.config.config import ConfigError
from tokenyard.train.logging.journal import read_journal

LLAMA = {"vocab_size": 264, "intermediate_size": 64}
LAYOUTS = {
    "one process": (1, []),
    "expert 2 x tensor 2": (4, EXPERTS),
    "shard 2 x expert_tensor 2": (4, ["parallel.shard=2", "parallel.expert_tensor=2"]),
    "deepspeed, expert 2 x tensor 2": (4, [*EXPERTS, "engine=deepspeed", "engine.zero=1"]),
}


def upcycled(experts: int, top_k: int, granularity: int = 1) -> list[str]:
    settings = {"experts": experts, "top_k": top_k, "granularity": granularity}
    return [f"checkpoint.upcycle.{key}={value}" for key, value in settings.items()]


@pytest.fixture
def dense(saved: Callable[..., Path]) -> Path:
    return saved("Llama", **LLAMA)


@pytest.mark.parametrize("wish", [(8, 2, 1), (12, 8, 4)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_weights_of_the_import(
    name: str, wish: tuple[int, int, int], dense: Path, ranks: Any, tmp_path: Path
) -> None:
    """From the Hugging Face folder, and from a dense checkpoint, whose file holds other rectangles."""
    world, layout = LAYOUTS[name]
    expected = read_whole(import_folder(dense, tmp_path / "imported", Upcycle(*wish, seed=3)).checkpoint)
    import_folder(dense, tmp_path / "dense")
    for source in (dense, tmp_path / "dense"):
        config = configured(source, tmp_path / f"from_{source.name}", *layout, *upcycled(*wish), "seed=3")
        found = opened(config) if world == 1 else ranks(4, opened, config)[0]
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_it_trains_from_the_loss_of_the_dense_model(build: Callable[..., Any], ranks: Any, tmp_path: Path) -> None:
    theirs = build("Qwen3", vocab_size=264, intermediate_size=64, head_dim=8)
    theirs.save_pretrained(tmp_path / "theirs")
    words = [*upcycled(8, 4, 2), "model.moe.balance.coefficient=0.02", "steps=3"]
    one, four = (configured(tmp_path / "theirs", tmp_path / name, *words) for name in ("one", "four"))
    start = f"new run from the weights of {tmp_path / 'theirs'}; each feed-forward upcycled to 8 experts"
    four.parallel.expert = four.parallel.tensor = 2
    assert trained(one) == ranks(4, trained, four)[0] == start
    of_one, of_four = (read_journal(tmp_path / name / "metrics.jsonl") for name in ("one", "four"))
    assert of_one[0]["loss"] == pytest.approx(their_loss(theirs, one).cross_entropy, rel=2e-6)
    assert of_one[2]["loss"] < of_one[0]["loss"]
    for key in ("loss", "loss_balance_scaled", "grad_norm"):
        assert [record[key] for record in of_four] == pytest.approx([record[key] for record in of_one], rel=2e-5)
    transformers = pytest.importorskip("transformers")
    assert export_checkpoint(tmp_path / "four", tmp_path / "back").architecture == "Qwen3MoeForCausalLM"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    ids = torch.arange(40).view(2, 20)
    torch.testing.assert_close(again(ids).logits, tokenyard.load_model(tmp_path / "four")(ids), rtol=1e-4, atol=1e-4)


def test_a_second_start_resumes_even_without_the_dense_model(dense: Path, tmp_path: Path) -> None:
    config = configured(dense, tmp_path / "run", *upcycled(4, 2))
    trained(config)
    dense.rename(tmp_path / "gone")
    again = configured(dense, tmp_path / "run", *upcycled(4, 2), "steps=4")
    assert trained(again) == f"resumed after step 2 from {tmp_path / 'run' / 'checkpoints' / 'step_00000002'}"


def test_how_new_routers_are_drawn_is_the_runs(dense: Path, tmp_path: Path) -> None:
    found = opened(configured(dense, tmp_path / "run", *upcycled(64, 2), "model.init_std=0.5"))
    assert 0.4 < found["layers.0.moe.router.weight"].std() < 0.6


REFUSED = [
    (["experts=7", "granularity=2"], "checkpoint.upcycle.experts=7: must be a multiple of granularity=2; "
     "nearest valid: checkpoint.upcycle.experts=8"),
    (["experts=8", "top_k=1"], "checkpoint.upcycle.top_k=1: must be at least 2, with one expert a token its weight is below 1; "
     "nearest valid: checkpoint.upcycle.top_k=2"),
    (["experts=4", "top_k=8"], "checkpoint.upcycle.top_k=8: must be at most experts=4; nearest valid: checkpoint.upcycle.top_k=4"),
    (["top_k=4"], "checkpoint.upcycle.top_k=4: needs checkpoint.upcycle.experts; nearest valid: checkpoint.upcycle.top_k=2"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_cannot_be_upcycled(words: list[str], says: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(dense, tmp_path / "run", *(f"checkpoint.upcycle.{word}" for word in words))
    assert str(caught.value) == says


def test_what_does_not_go_with_it(dense: Path, saved: Callable[..., Path], tmp_path: Path) -> None:
    sparse = saved("Mixtral", vocab_size=264, num_local_experts=4)
    refused = {
        "checkpoint.upcycle.experts=8: needs a dense model in checkpoint.init; nearest valid: checkpoint.upcycle.experts=null": (
            dense, ["checkpoint.init=null", "checkpoint.upcycle.experts=8"]),
        f"checkpoint.upcycle.experts=8: the model of checkpoint.init={sparse} has experts already; "
        "nearest valid: checkpoint.upcycle.experts=null": (sparse, ["checkpoint.upcycle.experts=8"]),
        "model.moe.top_k=4: is checkpoint.upcycle.top_k=2 of an upcycled model; nearest valid: checkpoint.upcycle.top_k=4": (
            dense, ["checkpoint.upcycle.experts=8", "model.moe.top_k=4"]),
        f"model.moe.experts=4: does not fit the weights of checkpoint.init={dense}; nearest valid: model.moe.experts=8": (
            dense, ["checkpoint.upcycle.experts=8", "model.moe.experts=4"]),
    }  # fmt: skip
    for says, (source, words) in refused.items():
        with pytest.raises(ConfigError) as caught:
            configured(source, tmp_path / "run", *words)
        assert str(caught.value) == says
