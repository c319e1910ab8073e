"""Export to any number of files, complete or not at all; and an imported model trains on its family's loss."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenyard.checkpoint.manifest import DamagedCheckpoint
from tokenyard.checkpoint.store import read_whole, save_checkpoint
from tokenyard.checkpoint.verify import check_all
from tokenyard.data.batches import IGNORE
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.load_weights import open_source
from tokenyard.moe.config import (
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    Score,
)
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.config.serialize import plain_config
from tokenyard.train.loss import Totals, add_pooled_balance, losses, pooled_sums
from torch import Tensor

IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48


def written(folder: Path, model: ModelConfig) -> Path:
    """A checkpoint of the freshly initialised model, with random norms and expert biases."""
    made = Transformer(model)
    initialise(made, seed=1)
    torch.manual_seed(1)
    for name, tensor in made.state_dict().items():
        if "norm" in name or "bias" in name:
            tensor.normal_(0.5, 0.3)
    held = {f"model.{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in made.state_dict().items()}
    return save_checkpoint(folder, 3, held, {"config": {"model": plain_config(model), "sequence_length": 32}})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_names_are_as_published(tmp_path: Path) -> None:
    path = written(tmp_path / "ours", ModelConfig(layers=1, width=32, heads=4, kv_heads=2, vocabulary=48, moe=MoEConfig(2, 2, 16)))
    export_checkpoint(path, tmp_path / "theirs")
    layer = "model.layers.0."
    assert sorted(tensors(tmp_path / "theirs")) == sorted(
        [
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.norm.weight",
            f"{layer}input_layernorm.weight",
            f"{layer}post_attention_layernorm.weight",
            *(f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"),
            f"{layer}block_sparse_moe.gate.weight",
            *(f"{layer}block_sparse_moe.experts.{expert}.w{index}.weight" for expert in (0, 1) for index in (1, 2, 3)),
        ]
    )
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "theirs").keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(tmp_path / "theirs").values())


V3 = ModelConfig(
    layers=2,
    width=32,
    heads=4,
    hidden=24,
    vocabulary=48,
    dense_first=1,
    norm_epsilon=1e-6,
    mtp_depth=1,
    attention=AttentionConfig(kind=AttentionKind.mla, rope=RopeConfig(interleaved=True)),
    moe=MoEConfig(4, 2, 16, shared_hidden=16, router=RouterConfig(score=Score.sigmoid), balance=BalanceConfig(bias_rate=0.001)),
)


def test_prediction_modules_stand_behind_the_layers(tmp_path: Path) -> None:
    path = written(tmp_path / "ours", V3)
    exported = export_checkpoint(path, tmp_path / "theirs", dtype="bf16")
    assert exported.architecture == "DeepseekV3ForCausalLM"
    assert any(note.startswith("model.mtp_after_norm=false: the prediction modules have learned from") for note in exported.notes)
    found = tensors(tmp_path / "theirs")
    module = {name.removeprefix("model.layers.2.") for name in found if name.startswith("model.layers.2.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.norm.weight"} <= module
    assert {"shared_head.head.weight", "mlp.experts.3.up_proj.weight", "self_attn.kv_b_proj.weight"} <= module
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    again = read_whole(import_folder(tmp_path / "theirs", tmp_path / "again").checkpoint)
    before = read_whole(path)
    assert again.keys() == before.keys() and any(name.startswith("mtp.0.block.moe.") for name in again)
    for name, tensor in before.items():
        assert torch.equal(again[name], tensor if name.endswith("expert_bias") else tensor.bfloat16()), name
    file = tmp_path / "theirs" / "model-00001-of-00001.safetensors"
    save_file(found | {"model.layers.2.shared_head.head.weight": found["lm_head.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.shared_head\.head\.weight must equal lm_head\.weight"):
        tokenyard.load_model(tmp_path / "theirs")
    save_file({name: tensor for name, tensor in found.items() if not name.endswith("enorm.weight")}, file)
    write_index(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.enorm\.weight is missing"):
        tokenyard.load_model(tmp_path / "theirs")


def write_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")


def test_a_bias_of_an_earlier_run_goes_along(tmp_path: Path) -> None:
    import dataclasses

    model = dataclasses.replace(V3, mtp_depth=0)
    weights = read_whole(written(tmp_path / "ours", model))
    model = dataclasses.replace(model, moe=dataclasses.replace(V3.moe, balance=BalanceConfig()))
    held = {f"model.{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()}
    path = save_checkpoint(tmp_path / "later", 9, held, {"config": {"model": plain_config(model)}})
    export_checkpoint(path, tmp_path / "theirs")
    bias = tensors(tmp_path / "theirs")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, weights["layers.1.moe.router.expert_bias"]) and bias.any()


def test_what_is_refused_leaves_nothing(tmp_path: Path) -> None:
    small = {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "vocabulary": 48}
    null = written(tmp_path / "null", ModelConfig(**small, moe=MoEConfig(2, 2, 16, router=RouterConfig(null_experts=1))))
    with pytest.raises(ValueError, match=r"^model\.moe\.router\.null_experts=1: no architecture can express it"):
        export_checkpoint(null, tmp_path / "theirs")
    path = written(tmp_path / "ours", ModelConfig(**small, moe=MoEConfig(2, 2, 16)))
    with pytest.raises(ValueError, match=r"^--architecture=Mixtral: must be one of LlamaForCausalLM"):
        export_checkpoint(path, tmp_path / "theirs", architecture="Mixtral")
    with pytest.raises(ValueError, match="OlmoeForCausalLM cannot express it"):
        export_checkpoint(path, tmp_path / "theirs", architecture="OlmoeForCausalLM")
    with pytest.raises(ValueError, match="neither a checkpoint nor a run folder"):
        export_checkpoint(tmp_path, tmp_path / "theirs")
    shard = path / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000\.safetensors is damaged"):
        export_checkpoint(path, tmp_path / "theirs")
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["null", "ours"]
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").touch()
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        export_checkpoint(written(tmp_path / "ours", ModelConfig(**small, moe=MoEConfig(2, 2, 16))), tmp_path / "theirs")


def test_import_does_not_touch_a_run(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Llama")
    import_folder(theirs, tmp_path / "ours")
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        import_folder(theirs, tmp_path / "ours")


@pytest.mark.parametrize(("layers", "top_k"), [(1, 2), (1, 3), (4, 2)])
def test_an_imported_mixtral_trains_on_their_loss(layers: int, top_k: int, build: Callable[..., Any], tmp_path: Path) -> None:
    """Cross entropy plus auxiliary loss, and gradients."""
    settings = {"num_hidden_layers": layers, "num_local_experts": 4, "num_experts_per_tok": top_k, "router_aux_loss_coef": 0.05}
    theirs = build("Mixtral", **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tokenyard.load_model(tmp_path / "theirs").train()
    labels = IDS.masked_fill(IDS % 5 == 0, IGNORE)
    expected = theirs(IDS, labels=labels, output_router_logits=True).loss
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    logits, stats = ours(IDS, with_stats=True)
    totals = Totals(int((targets != IGNORE).sum()), len(IDS), 1)
    summed = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    mesh, moe = build_mesh(ParallelConfig()), ours.config.moe
    share = add_pooled_balance(losses(summed, stats, moe, totals, mesh), pooled_sums(stats, moe), moe, totals, mesh)
    torch.testing.assert_close(share.objective, expected, rtol=0, atol=1e-5)
    expected.backward()
    share.objective.backward()
    for name, ((mine, part),) in open_source(tmp_path / "theirs").plan.items():
        owner, shown = their_gradient(theirs, name)
        torch.testing.assert_close(part.written(ours.get_parameter(mine).grad), shown, rtol=0, atol=1e-4, msg=f"{name} {owner}")


def their_gradient(theirs: Any, name: str) -> tuple[str, Tensor]:
    """The gradient of a published tensor, cut out of the fused tensors that transformers trains."""
    name = name.replace("block_sparse_moe", "mlp")
    if ".experts." not in name:
        return name, theirs.get_parameter(name).grad
    layer, _, rest = name.partition(".experts.")
    expert, which, _ = rest.split(".")
    if which == "w2":
        return layer, theirs.get_parameter(f"{layer}.experts.down_proj").grad[int(expert)]
    return layer, theirs.get_parameter(f"{layer}.experts.gate_up_proj").grad[int(expert)].chunk(2)[which == "w3"]


def test_only_the_files_that_an_import_carried_go_along(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs, private = saved("Mixtral", num_local_experts=4), tmp_path / "private"
    (theirs / "chat_template.jinja").write_text("a template")
    checkpoint = import_folder(theirs, tmp_path / "ours").checkpoint
    private.write_text("a key")
    (checkpoint / "tokenizer_hf" / "model-00001-of-00001.safetensors").write_text("other weights")
    (checkpoint / "tokenizer_hf" / "vocab.json").symlink_to(private)
    export_checkpoint(checkpoint, tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "a template"
    assert not (tmp_path / "again" / "vocab.json").exists()
    assert tensors(tmp_path / "again").keys() == tensors(theirs).keys()
    with pytest.raises(DamagedCheckpoint, match=r"model-00001-of-00001\.safetensors is not listed in manifest\.json"):
        check_all(checkpoint)


def test_a_listed_file_that_is_a_link_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs, private = saved("Mixtral", num_local_experts=4), tmp_path / "private"
    private.write_text("a template")
    (theirs / "chat_template.jinja").write_text("a template")
    checkpoint = import_folder(theirs, tmp_path / "ours").checkpoint
    (checkpoint / "tokenizer_hf" / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_hf" / "chat_template.jinja").symlink_to(private)
    with pytest.raises(DamagedCheckpoint, match=r"chat_template\.jinja is no regular file"):
        export_checkpoint(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()
