"""Each family against transformers: equal logits after an import, equal tensors and logits after an export."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import CASES, IMPORTED, LLAMA3
from safetensors.torch import load_file, save_file
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from torch import Tensor, nn

BOTH_WAYS = {name: case for name, case in CASES.items() if name not in IMPORTED}
cases = pytest.mark.parametrize(("family", "settings"), CASES.values(), ids=list(CASES))
both_ways = pytest.mark.parametrize(("family", "settings"), BOTH_WAYS.values(), ids=list(BOTH_WAYS))
IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48


@cases
def test_same_logits(family: str, settings: dict[str, Any], saved: Callable[..., Path], build: Callable[..., Any]) -> None:
    expected = build(family, **settings)(IDS).logits
    found = tokenyard.load_model(saved(family, **settings))(IDS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@cases
def test_same_logits_in_fp64(
    family: str,
    settings: dict[str, Any],
    saved: Callable[..., Path],
    build: Callable[..., Any],
    widest: Callable[[str], None],
) -> None:
    folder = saved(family, **settings)
    widest(family)
    expected = build(family, **settings).double()(IDS).logits
    torch.testing.assert_close(tokenyard.load_model(folder, "fp64")(IDS), expected, rtol=0, atol=1e-8)


@both_ways
def test_round_trip_is_bit_equal(family: str, settings: dict[str, Any], saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved(family, **settings)
    checkpoint = import_folder(theirs, tmp_path / "ours").checkpoint
    export_checkpoint(tmp_path / "ours", tmp_path / "again", shard_bytes=20_000)
    assert_same_tensors(tensors(tmp_path / "again"), tensors(theirs))
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert_same_model(tokenyard.load_model(checkpoint), tokenyard.load_model(theirs))
    written, given = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", theirs))
    if family == "Qwen3Moe":  # published files have the other name, transformers takes both
        given["num_experts"] = given.pop("num_local_experts")
    if family in ("DeepseekV3", "Glm4Moe"):  # the modules that the key speaks of are not in the files
        assert given.pop("num_nextn_predict_layers") == 1
    del given["transformers_version"]
    given["rope_parameters"] = written["rope_parameters"] | given["rope_parameters"]  # defaults may be said
    if family == "Dots1" or settings.get("use_sliding_window"):  # layer_types goes before it
        given["max_window_layers"] = written.get("max_window_layers")
    assert {key: written.get(key) for key in given} == given


@both_ways
def test_transformers_opens_the_export(
    family: str, settings: dict[str, Any], saved: Callable[..., Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    import_folder(saved(family, **settings), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert {key: value for key, value in loading.items() if value} == {}
    assert_same_model(again, build(family, **settings))


FUSED = [name for name in CASES if name.split()[0] in ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe")]


@pytest.mark.parametrize("name", [name for name in FUSED if " " not in name])
def test_experts_as_they_are_in_memory_are_read_too(name: str, build: Callable[..., Any], tmp_path: Path) -> None:
    family, settings = CASES[name]
    model = build(family, **settings)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in tensors(tmp_path / "fused"))
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "fused")(IDS), model(IDS).logits, rtol=0, atol=1e-4)


def test_bf16_stays_bf16(build: Callable[..., Any], tmp_path: Path) -> None:
    build("Mixtral", num_local_experts=4).bfloat16().save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    for dtype, code in ((None, torch.bfloat16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        export_checkpoint(tmp_path / "ours", tmp_path / f"{dtype}", dtype=dtype)
        found = tensors(tmp_path / f"{dtype}")
        assert_same_tensors(found, {name: tensor.to(code) for name, tensor in tensors(tmp_path / "theirs").items()})
        said = json.loads((tmp_path / f"{dtype}" / "config.json").read_text())["dtype"]
        assert said == str(code).removeprefix("torch.")


def test_older_names_of_the_rope_keys_mean_the_same(saved: Callable[..., Path]) -> None:
    folder = saved("Llama", rope_parameters=LLAMA3)
    expected = tokenyard.load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    old = copy.deepcopy(config.pop("rope_parameters"))
    config |= {"rope_theta": old.pop("rope_theta"), "rope_scaling": {"type": old.pop("rope_type"), **old}}
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_model(tokenyard.load_model(folder), expected)


def test_a_tied_head_that_is_written_too_must_be_equal(saved: Callable[..., Path]) -> None:
    folder = saved("Qwen3", head_dim=8, tie_word_embeddings=True)
    expected, found = tokenyard.load_model(folder), tensors(folder)
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, folder / "model.safetensors")
    assert_same_model(tokenyard.load_model(folder), expected)
    found["lm_head.weight"][3, 4] += 1
    save_file(found, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight must equal model\.embed_tokens\.weight"):
        tokenyard.load_model(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_model(found: nn.Module, expected: nn.Module) -> None:
    """Weights are equal bit for bit. Logits may differ by rounding: a BLAS chooses kernels by the alignment of the weights."""
    assert_same_tensors(found.state_dict(), expected.state_dict())
    one, other = (model(IDS) for model in (found, expected))
    one, other = (output if isinstance(output, Tensor) else output.logits for output in (one, other))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name
