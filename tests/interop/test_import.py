"""What an import accepts can be opened, trained and exported, whatever its widths."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import MLA, ROUTED
from init_runs import configured, their_loss, trained
from tokenyard.checkpoint.store import read_whole
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.train.logging.journal import read_journal

ODD = {"num_local_experts": 4, "hidden_size": 36, "intermediate_size": 21, "head_dim": 8, "vocab_size": 264}


@pytest.mark.parametrize(("world", "layout"), [(1, []), (4, ["parallel.expert=2", "parallel.tensor=2"]), (4, ["parallel.shard=4"])])
def test_widths_that_no_multiple_of_16_bytes_are(
    world: int, layout: list[str], build: Callable[..., Any], ranks: Any, tmp_path: Path
) -> None:
    theirs = build("Mixtral", **ODD)
    theirs.save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    config = configured(tmp_path / "ours", tmp_path / "run", "tokenizer=bytes", *layout)
    assert (trained(config) if world == 1 else ranks(4, trained, config)[0]).startswith("new run from the weights of")
    first = read_journal(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(their_loss(theirs, config).cross_entropy, rel=2e-6)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    ids = torch.arange(40).view(2, 20)
    logits = tokenyard.load_model(tmp_path / "back")(ids)
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "run")(ids), logits, rtol=1e-4, atol=1e-4)
    assert (theirs(ids).logits - logits).abs().max() > 1e-3


WITHOUT = {"n_shared_experts": 0, "num_hidden_layers": 3, "first_k_dense_replace": 1}
NO_SHARED: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**MLA, **WITHOUT},
    "DeepseekV3": {**MLA, **WITHOUT, "n_group": 4, "topk_group": 2},
    "Glm4Moe": {**ROUTED, **WITHOUT, "head_dim": 16},
    "Dots1": {**ROUTED, **WITHOUT, "norm_topk_prob": True, "sliding_window": None},
}


@pytest.mark.parametrize("family", NO_SHARED)
def test_models_without_shared_experts_go_there_and_back(family: str, build: Callable[..., Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = build(family, **NO_SHARED[family])
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of empty tensors
        theirs.save_pretrained(tmp_path / "theirs")
        checkpoint = import_folder(tmp_path / "theirs", tmp_path / "ours").checkpoint
        assert not any("shared" in name for name in read_whole(checkpoint))
        assert export_checkpoint(tmp_path / "ours", tmp_path / "back").architecture == f"{family}ForCausalLM"
        again, loading = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "back", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
    missing = {name: again.state_dict()[name].numel() for name in loading.pop("missing_keys")}
    assert not any(missing.values()) and all("shared_experts" in name for name in missing)
    assert not any(loading.values())
    ids = torch.arange(40).view(2, 20)
    expected = theirs(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "ours")(ids), expected, rtol=0, atol=1e-4)
