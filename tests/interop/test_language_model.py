"""The language model of a folder with a model for images too."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import DELTA
from tokenyard.interop.config_mapping import read_config
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder

IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48
TEXT = DELTA | {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 2,
    "num_position_embeddings": 16,
}


def saved_with_vision(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3_5MoeConfig(text_config=TEXT, vision_config=VISION)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Qwen3_5MoeForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


def test_qwen3_5_without_its_eyes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = saved_with_vision(tmp_path / "theirs")
    expected = theirs(IDS).logits
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "theirs")(IDS), expected, rtol=0, atol=1e-4)
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    eyes = sum(name.startswith("model.visual.") for name in theirs.state_dict())
    assert f"{eyes} tensors have no place in the model and were left out" in "\n".join(imported.notes)
    assert export_checkpoint(tmp_path / "ours", tmp_path / "back").architecture == "Qwen3_5MoeForCausalLM"
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", experts_implementation="eager"
    )
    found, held = again.state_dict(), {name: tensor for name, tensor in theirs.state_dict().items() if ".visual." not in name}
    assert len(found) == len(held)
    assert all(torch.equal(found[name.replace(".language_model", "")], tensor) for name, tensor in held.items())


def test_a_key_beside_the_text_is_refused_and_the_outer_tie_counts(tmp_path: Path) -> None:
    saved_with_vision(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"^config\.json: quantum_heads=3: is not supported$"):
        read_config(config | {"quantum_heads": 3})
    with pytest.raises(ValueError, match=r"^config\.json: hidden_act='gelu': must be 'silu'$"):
        read_config(config | {"text_config": config["text_config"] | {"hidden_act": "gelu"}})
    tied = {**config, "text_config": config["text_config"] | {"tie_word_embeddings": True}}
    assert [read_config(tied | {"tie_word_embeddings": tie})[1].tie_embeddings for tie in (False, True)] == [False, True]
