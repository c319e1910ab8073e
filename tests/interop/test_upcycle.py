"""An upcycled model computes the same as its dense model, for any number of experts and slices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import LLAMA3, YARN
from tokenyard.checkpoint.store import read_facts, read_whole
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.upcycle import Upcycle, upcycled_config
from tokenyard.moe.config import ModelConfig, MoEConfig

IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48
DENSE = {"Llama": {"intermediate_size": 64}, "Qwen3": {"intermediate_size": 64, "head_dim": 8, "tie_word_embeddings": True}}
WISHES = [
    Upcycle(experts=8, top_k=2),
    Upcycle(experts=3, top_k=3),
    Upcycle(experts=8, top_k=2, granularity=2),
    Upcycle(experts=16, top_k=8, granularity=4),
    Upcycle(experts=8, top_k=8, granularity=8),
]


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("wish", WISHES, ids=["-".join(map(str, wish)) for wish in WISHES])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("fp64", 1e-8)])
def test_the_first_forward_pass_is_the_dense_one(
    family: str, wish: Upcycle, precision: str, tolerance: float, saved: Callable[..., Path], tmp_path: Path
) -> None:
    theirs = saved(family, **DENSE[family])
    import_folder(theirs, tmp_path / "ours", wish)
    found = tokenyard.load_model(tmp_path / "ours", precision)
    assert {block.moe.experts.down.shape for block in found.blocks} == {(wish.experts, 32, 64 // wish.granularity)}
    expected = tokenyard.load_model(theirs, precision)(IDS)
    torch.testing.assert_close(found(IDS), expected, rtol=0, atol=tolerance)


def test_a_token_chooses_each_slice_equally_often(saved: Callable[..., Path], tmp_path: Path) -> None:
    wish = Upcycle(experts=16, top_k=8, granularity=4)
    import_folder(saved("Llama", intermediate_size=64), tmp_path / "ours", wish)
    router = tokenyard.load_model(tmp_path / "ours").blocks[0].moe.router
    chosen = router(torch.randn(3, 50, 32)).experts_TK
    assert len({frozenset(row) for row in chosen.tolist()}) > 3
    slices = chosen % wish.granularity
    assert ((slices[..., None] == torch.arange(wish.granularity)).sum(1) == wish.top_k // wish.granularity).all()


def test_the_router_depends_on_seed_and_name_alone(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Llama", intermediate_size=64)
    made = [
        read_whole(import_folder(theirs, tmp_path / str(index), Upcycle(4, seed=seed)).checkpoint)
        for index, seed in enumerate((1, 1, 2))
    ]
    name = "layers.{}.moe.router.weight"
    one, again, other = (weights[name.format(0)] for weights in made)
    assert torch.equal(one, again) and not torch.equal(one, other) and not torch.equal(one, made[0][name.format(1)])
    assert 0.01 < one.std() < 0.03


EXPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama": ("Llama", {}, "MixtralForCausalLM"),
    "Llama 3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 12}, "MixtralForCausalLM"),
    "Llama, yarn": ("Llama", {"rope_parameters": YARN, "rms_norm_eps": 0.1}, "MixtralForCausalLM"),
    "Mistral": ("Mistral", {"sliding_window": None}, "MixtralForCausalLM"),
    "Mistral, window": ("Mistral", {"sliding_window": 5, "head_dim": 12}, "MixtralForCausalLM"),
    "Qwen3": ("Qwen3", DENSE["Qwen3"], "Qwen3MoeForCausalLM"),
    "Qwen2": ("Qwen2", {}, "Qwen2MoeForCausalLM"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # Qwen2-MoE's shared expert, of width 0
@pytest.mark.parametrize(("family", "settings", "architecture"), EXPORTED.values(), ids=list(EXPORTED))
def test_transformers_opens_the_result(
    family: str, settings: dict[str, Any], architecture: str, saved: Callable[..., Path], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = saved(family, **{"intermediate_size": 64, **settings})
    checkpoint = import_folder(theirs, tmp_path / "ours", Upcycle(8, 4, 2)).checkpoint
    assert read_facts(checkpoint)["source"]["upcycle"] == {"experts": 8, "top_k": 4, "granularity": 2, "seed": 1}
    assert export_checkpoint(checkpoint, tmp_path / "again").architecture == architecture
    expected = transformers.AutoModelForCausalLM.from_pretrained(theirs)(IDS).logits
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=1e-4)


def test_what_mixtral_has_not_is_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    import_folder(saved("Llama", intermediate_size=64, attention_bias=True), tmp_path / "ours", Upcycle(8))
    with pytest.raises(ValueError, match=r"^model\.attention\.qkv_bias=True: MixtralForCausalLM cannot express it$"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again", architecture="MixtralForCausalLM")
    assert not (tmp_path / "again").exists()


REFUSED = [
    (Upcycle(1), "experts=1: must be at least 2"),
    (Upcycle(8, 1), "top_k=1: must be at least 2, with one expert a token its weight is below 1; nearest valid: top_k=2"),
    (Upcycle(8, 2, 0), "granularity=0: must be at least 1"),
    (Upcycle(7, 2, 2), "experts=7: must be a multiple of granularity=2; nearest valid: experts=8"),
    (Upcycle(8, 3, 4), "top_k=3: must be a multiple of granularity=4; nearest valid: top_k=4"),
    (Upcycle(4, 8), "top_k=8: must be at most experts=4; nearest valid: top_k=4"),
    (Upcycle(16, 16, 16), "granularity=16: must cut the hidden width 64 into slices of a multiple of 8"),
]


@pytest.mark.parametrize(("wish", "says"), REFUSED, ids=[says[:20] for _, says in REFUSED])
def test_what_cannot_be_upcycled(wish: Upcycle, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        upcycled_config(ModelConfig(hidden=64, moe=MoEConfig(experts=0)), wish)
    assert str(caught.value).startswith(f"--upcycle {says}")


def test_a_model_with_experts_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has experts already"):
        import_folder(saved("Mixtral"), tmp_path / "ours", Upcycle(8))
    assert not (tmp_path / "ours").exists()
