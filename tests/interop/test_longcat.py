"""LongCat-Flash: what transformers stores of its zero experts, what published folders hold instead, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import LONGCAT
from safetensors.torch import load_file, save_file
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder

from .test_families import IDS, assert_same_model

WEIGHTS = "model.safetensors"


def test_a_published_folder_has_no_gates_of_zero_experts(saved: Callable[..., Path]) -> None:
    """It has a multi-token prediction module, which transformers leaves out too, and keys that transformers does not know."""
    folder = saved("LongcatFlash", **LONGCAT)
    expected, stored = tokenyard.load_model(folder), load_file(folder / WEIGHTS)
    idle = [name for name in stored for expert in (4, 5, 6) if f".experts.{expert}." in name]
    assert len(idle) == 2 * 3 * 2
    for name in idle:
        del stored[name]
    save_file(stored | {"model.mtp.norm.weight": torch.ones(32)}, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    theirs = {"attention_method": "MLA", "mla_scale_q_lora": True, "zero_expert_type": "identity", "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config | theirs))
    assert_same_model(tokenyard.load_model(folder), expected)
    save_file(stored | {"model.layers.0.mlp.experts.7.gate_proj.weight": torch.ones(16, 32)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"tensor model\.layers\.0\.mlp\.experts\.7\.gate_proj\.weight .* has no place"):
        tokenyard.load_model(folder)


def test_transformers_opens_an_export_with_zero_experts(
    saved: Callable[..., Path], build: Callable[..., Any], tmp_path: Path
) -> None:
    import transformers

    import_folder(saved("LongcatFlash", **LONGCAT), tmp_path / "ours")
    (note,) = (each for each in export_checkpoint(tmp_path / "ours", tmp_path / "again").notes if "copies" in each)
    assert note.startswith("12 tensors, as model.layers.0.mlp.experts.4.gate_proj.weight, are copies of others")
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert {key: value for key, value in loading.items() if value} == {}
    torch.testing.assert_close(again(IDS).logits, build("LongcatFlash", **LONGCAT)(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("zero_expert_type", "copy", "must be None or 'identity'"),
        ("router_bias", True, "must be None or False, transformers would not add it"),
        ("mla_scale_q_lora", False, "must be None or True, transformers always does it"),
        ("num_hidden_layers", 2, "must be 4"),
        ("q_lora_rank", None, "must be a whole number of at least 1"),
        ("head_dim", 4, "must be None or 8"),
        ("zero_expert_num", -1, "must be a whole number of at least 0"),
    ],
)
def test_what_is_another_model_is_refused(key: str, value: Any, says: str, saved: Callable[..., Path]) -> None:
    folder = saved("LongcatFlash", **LONGCAT)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}={value!r}: {says}"):
        tokenyard.load_model(folder)
