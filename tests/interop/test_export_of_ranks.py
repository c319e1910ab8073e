"""transformers opens exports of checkpoints written on 4 ranks (expert 2 x tensor 2), one of each family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from tokenyard.checkpoint.store import read_whole
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.run import single_step
from tokenyard.train.setup import open_session

FAMILIES = {
    "tiny_mixtral": "MixtralForCausalLM",
    "tiny_qwen2_moe": "Qwen2MoeForCausalLM",
    "tiny_qwen3_moe": "Qwen3MoeForCausalLM",
    "tiny_deepseek_v2": "DeepseekV2ForCausalLM",
    "tiny_deepseek_v3": "DeepseekV3ForCausalLM",
    "tiny_gpt_oss": "GptOssForCausalLM",
    "tiny_olmoe": "OlmoeForCausalLM",
}
# Larger weights, so that logits have something to tell; transformers has no multi-token prediction.
SETTINGS = """steps=1 sequence_length=16 batch.sequences=4 data=synthetic data.synthetic_documents=16 tokenizer=bytes tracker=jsonl
    evaluate.sequences=4 model.init_std=0.2 model.mtp_depth=0 parallel.expert=2 parallel.tensor=2"""


def train(folder: Path) -> None:
    """Trains a step of each model on 4 ranks and saves its checkpoint."""
    for name in FAMILIES:
        config = compose([*SETTINGS.split(), f"model={name}", f"run.dir={folder / name}", f"data.cache={folder / 'cache'}"])
        session = open_session(config, torch.device("cpu"))
        session.parallel.model.train()
        single_step(session)
        save(session)


@pytest.fixture(scope="module")
def runs(ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    ranks(4, train, folder, limit_seconds=300)
    return folder


@pytest.mark.parametrize(("name", "architecture"), FAMILIES.items())
def test_transformers_opens_the_export_and_the_way_back_is_bit_equal(
    name: str, architecture: str, runs: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.arange(40).view(2, 20)
    made = export_checkpoint(runs / name, tmp_path / "theirs", shard_bytes=200_000)
    assert made.architecture == architecture and len(made.files) > 1 and made.notes == []
    theirs, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert {key: value for key, value in loading.items() if value} == {}
    logits = tokenyard.load_model(runs / name)(ids)
    assert logits.std() > 0.3
    torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-4)
    import_folder(tmp_path / "theirs", tmp_path / "again")
    before, after = (
        read_whole(path) for path in (runs / name / "checkpoints" / "step_00000001", tmp_path / "again" / "step_00000000")
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["max_position_embeddings"] >= 16 and config["eos_token_id"] == 2
    assert json.loads((tmp_path / "theirs" / "generation_config.json").read_text())["eos_token_id"] == 2
