"""Contents of a Hugging Face folder: every tensor has a place, or one line refuses it by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import ERNIE
from safetensors.torch import load_file, save_file
from tokenyard.interop.import_ import import_folder

Saved = Callable[..., Path]
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


@pytest.fixture
def folder(saved: Saved) -> Path:
    return saved("Mixtral", num_local_experts=4)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        tokenyard.load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(EXPERT))
    assert f"tensor {EXPERT} is missing" in refusal(folder)


def test_a_tensor_too_many_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EXPERT.replace(".3.", ".4."): torch.zeros(32, 24)}))
    assert f"tensor {EXPERT.replace('.3.', '.4.')} of shape (32, 24) has no place in MixtralForCausalLM" in refusal(folder)


def test_a_misshapen_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}))
    assert f"tensor {EXPERT} has the shape (24, 32): must be (32, 24)" in refusal(folder)


def test_a_quantized_tensor_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}))
    assert f"tensor {EXPERT} is of type F8_E4M3: must be one of F64, F32, F16, BF16" in refusal(folder)


def test_old_rotary_buffers_are_left_out(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    tokenyard.load_model(folder)


def test_a_prediction_module_that_transformers_leaves_out_is_left_out_with_a_note(saved: Saved, tmp_path: Path) -> None:
    folder = saved("Ernie4_5_Moe", **ERNIE)
    module = {f"model.mtp_{name}": torch.zeros(2) for name in ("block.0.mlp.up_proj.weight", "emb_norm.0.weight")}
    assert not any("left out" in note for note in import_folder(folder, tmp_path / "before").notes)
    rewrite(folder, lambda tensors: tensors.update(module))
    notes = import_folder(folder, tmp_path / "after").notes
    assert "2 tensors have no place in the model and were left out, such as model.mtp_block.0.mlp.up_proj.weight" in notes


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: is a pickle, which can run code; only safetensors are read" in refusal(folder)
    (folder / "pytorch_model.bin").unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(folder)


def test_damaged_files_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors here")
    assert "model.safetensors is no readable safetensors file" in refusal(folder)
    (folder / "config.json").write_text("{")
    assert "config.json is no readable JSON" in refusal(folder)


@pytest.fixture
def sharded(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"part-{index % 3}.safetensors" for index, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read(sharded: Path, build: Callable[..., Any]) -> None:
    ids = torch.arange(10).view(1, 10)
    expected = build("Mixtral", num_local_experts=4)(ids).logits
    torch.testing.assert_close(tokenyard.load_model(sharded)(ids), expected, rtol=0, atol=1e-4)


def test_the_index_must_tell_the_truth(sharded: Path) -> None:
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(sharded, weight_map | {EXPERT: "../part-0.safetensors"})
    assert "must be the plain name of a .safetensors file" in refusal(sharded)
    write_index(sharded, weight_map | {EXPERT: "part-0.bin"})
    assert "must be the plain name of a .safetensors file" in refusal(sharded)
    write_index(sharded, weight_map | {"ghost": "part-0.safetensors"})
    assert "tensor ghost is missing" in refusal(sharded)
    (sharded / "part-1.safetensors").unlink()
    write_index(sharded, weight_map)
    assert "part-1.safetensors is no readable safetensors file" in refusal(sharded)


@pytest.mark.parametrize("name", ["chat_template.jinja", "config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, private = saved("Mixtral", num_local_experts=4), tmp_path / "private"
    private.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    with pytest.raises(ValueError, match=rf"{name}: is a link that leads out of its folder"):
        import_folder(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_links_of_the_hubs_cache_are_followed(saved: Saved, tmp_path: Path) -> None:
    folder, snapshot, blobs = (
        saved("Mixtral", num_local_experts=4),
        tmp_path / "hub" / "snapshots" / "abc",
        tmp_path / "hub" / "blobs",
    )
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        file.rename(blobs / f"hash of {file.name}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"hash of {file.name}"))
    import_folder(snapshot, tmp_path / "ours")
