"""Modules of multi-token prediction predict what transformers' MtpModel predicts with the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import CASES
from safetensors.torch import load_file, save_file
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.load_weights import open_source

IDS = torch.arange(2 * 19).view(2, 19) * 7 % 48
DEPTH = 2
LOGITS: Any = (1 + DEPTH) * [lambda x, _weight, head: head(x)]
families = pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])


def with_modules(name: str, build: Callable[..., Any], folder: Path) -> list[torch.Tensor]:
    """Saves a model with random prediction modules in `folder`. Returns the logits of each module, by transformers."""
    from transformers.modeling_layers import MtpModel

    family, settings = CASES[name]
    model = build(family, **settings, num_nextn_predict_layers=DEPTH)
    modules = MtpModel(model, DEPTH).eval()
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    for key, tensor in modules.layers.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape) * 0.3 + ("norm" in key))
        index, _, rest = key.removeprefix("layers.").partition(".")
        rest = rest.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        stored[f"model.layers.{model.config.num_hidden_layers + int(index)}.{rest}"] = tensor.clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    hidden, found = model.model(IDS).last_hidden_state, []
    for depth in range(1, DEPTH + 1):
        ids, hidden = IDS[:, depth:], hidden[:, : IDS.shape[1] - depth]
        positions = torch.arange(ids.shape[1])[None]
        hidden = modules.forward_layer(depth - 1, hidden, positions, None, input_ids=ids)
        found.append(model.lm_head(hidden))
    return found


@families
def test_logits_are_those_of_transformers(name: str, build: Callable[..., Any], tmp_path: Path) -> None:
    expected = with_modules(name, build, tmp_path)
    model = tokenyard.load_model(tmp_path).train()
    assert (model.config.mtp_depth, model.config.mtp_after_norm) == (DEPTH, True)
    before = before_norm(model)
    for depth, (logits, theirs) in enumerate(zip(model(IDS, head_losses=LOGITS)[0][1:], expected, strict=True), 1):
        torch.testing.assert_close(logits[:, : IDS.shape[1] - depth], theirs, rtol=0, atol=2e-4)
        assert (before[depth - 1][:, : IDS.shape[1] - depth] - theirs).std() > theirs.std() / 3, (
            "the other setting is another model"
        )


@families
def test_an_export_brings_them_back_and_says_nothing(name: str, build: Callable[..., Any], tmp_path: Path) -> None:
    expected = with_modules(name, build, tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    notes = export_checkpoint(tmp_path / "ours", tmp_path / "again").notes
    assert not any("mtp_after_norm" in note for note in notes)
    logits = tokenyard.load_model(tmp_path / "again").train()(IDS, head_losses=LOGITS)[0][1]
    torch.testing.assert_close(logits[:, :-1], expected[0], rtol=0, atol=2e-4)


def test_a_folder_without_modules_has_the_setting_of_a_model_without(saved: Callable[..., Path]) -> None:
    model = open_source(saved("DeepseekV3", **CASES["deepseek_v3"][1])).model
    assert (model.mtp_depth, model.mtp_after_norm) == (0, False)


def before_norm(model: Any) -> list[torch.Tensor]:
    """The logits that the modules would have before the norm."""
    model.config.mtp_after_norm = False
    found = model(IDS, head_losses=LOGITS)[0][1:]
    model.config.mtp_after_norm = True
    return found
