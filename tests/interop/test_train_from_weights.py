"""checkpoint.init: from transformers' models through training and back, on 1 and 4 ranks; the first loss is transformers'."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import DELTA, ERNIE, LONGCAT, MLA, QWEN, ROUTED, SOLAR
from init_runs import DENSE, EXPERTS, SETTINGS, configured, opened, their_loss, trained
from tokenyard.checkpoint.store import read_facts, read_whole
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.launch.main import main
from tokenyard.train.config.compose import parse_arguments
from tokenyard.train.load import open_checkpoint
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.setup import open_data_on_all_ranks
from tokenyard.train.weight_source import compose_run

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {**QWEN, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**QWEN, "head_dim": 16, "norm_topk_prob": True},
    "DeepseekV2": {**MLA, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "DeepseekV3": {**MLA, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "Glm4Moe": {**ROUTED, "head_dim": 16},
    "Glm4MoeLite": {**MLA, "n_shared_experts": 1},
    "SolarOpen": {**SOLAR, "head_dim": 16},
    "Dots1": {**ROUTED, "norm_topk_prob": True, "sliding_window": None},
    "Ernie4_5_Moe": {**ERNIE, "num_hidden_layers": 3},
    "MiniMaxM2": {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16},
    "GraniteMoe": {"num_local_experts": 8, "attention_multiplier": 0.3, "residual_multiplier": 0.22, "embedding_multiplier": 3.0},
    "FlexOlmo": {"num_experts": 8, "num_experts_per_tok": 3},
    "Qwen3Next": DELTA,
    "Qwen3_5Moe": DELTA,
    "LongcatFlash": {**LONGCAT, "n_routed_experts": 8},
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8, "tie_word_embeddings": True},
}
DENSE_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
WITHOUT_LOSS = {
    "DeepseekV3": "deepseek_v3",
    "Glm4Moe": "glm_4_5",
    "Glm4MoeLite": "glm_4_7_flash",
    "SolarOpen": "solar_open_100b",
    "Dots1": "dots_llm1",
    "LongcatFlash": "longcat_flash",
}
"""Families whose config.json has no coefficient, and the preset that has the published one."""


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_train_export(family: str, world: int, build: Callable[..., Any], ranks: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = build(family, vocab_size=264, **FAMILIES[family])
    theirs.save_pretrained(tmp_path / "theirs")
    layout = [] if world == 1 else DENSE if family in DENSE_FAMILIES else EXPERTS
    config = configured(tmp_path / "theirs", tmp_path / "run", *layout)
    start = trained(config) if world == 1 else ranks(4, trained, config)[0]
    balance = f"; config.json has no loss coefficients: the balance is that of model={WITHOUT_LOSS.get(family)}"
    assert start == f"new run from the weights of {tmp_path / 'theirs'}{balance if family in WITHOUT_LOSS else ''}"
    first, expected = read_journal(tmp_path / "run" / "metrics.jsonl")[0], their_loss(theirs, config)
    assert first["loss"] == pytest.approx(expected.cross_entropy, rel=2e-6)
    if expected.auxiliary is not None:
        assert first["loss_balance_scaled"] == pytest.approx(expected.auxiliary, rel=2e-6)
    assert (expected.auxiliary is None) == (family in (*DENSE_FAMILIES, *WITHOUT_LOSS, "DeepseekV2"))
    assert (first["step"], first["tokens"], first["lr"]) == (1, 256, 0.001)
    expressed = "Dots1", "Glm4MoeLite", "SolarOpen", "Qwen3_5Moe"  # by others, which come first
    asked = f"{family}ForCausalLM" if family in expressed else None
    made = export_checkpoint(tmp_path / "run", tmp_path / "back", architecture=asked)
    assert made.architecture == f"{family}ForCausalLM"
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert {key: value for key, value in loading.items() if value} == {}
    ids = torch.arange(40).view(2, 20)
    logits, exact = (tokenyard.load_model(tmp_path / "run", precision=precision)(ids) for precision in ("fp32", "fp64"))
    rounding_BS1 = (logits - exact).abs().amax(-1, keepdim=True)  # of some tokens a norm divides by nearly nothing
    assert ((again(ids).logits - logits).abs() <= 1e-4 + 1e-4 * logits.abs() + rounding_BS1).all()
    assert rounding_BS1.median() < 1e-4
    assert (theirs(ids).logits - logits).abs().max() > 1e-3


STARTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "expert 2 x tensor 2": (4, EXPERTS),
    "shard 2 x expert_tensor 2": (4, ["parallel.shard=2", "parallel.expert_tensor=2"]),
    "deepspeed, expert 2 x tensor 2": (4, [*EXPERTS, "engine=deepspeed", "engine.zero=1"]),
}


@pytest.mark.parametrize("name", STARTS)
def test_every_layout_and_engine_starts_from_the_same_bits(
    name: str, saved: Callable[..., Path], ranks: Any, tmp_path: Path
) -> None:
    """From the Hugging Face folder, from its import, and from a checkpoint of 4 ranks, whose own weights moved on from there."""
    world, layout = STARTS[name]
    theirs = saved("DeepseekV3", vocab_size=264, **FAMILIES["DeepseekV3"])
    expected = tokenyard.load_model(theirs).state_dict()
    import_folder(theirs, tmp_path / "imported")

    def weights(source: Path, name: str) -> dict[str, torch.Tensor]:
        config = configured(source, tmp_path / name, *layout)
        return opened(config) if world == 1 else ranks(4, opened, config)[0]

    for source in (theirs, tmp_path / "imported", tmp_path / "imported" / "step_00000000"):
        found = weights(source, f"from_{source.name}")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    ranks(4, trained, configured(theirs, tmp_path / "moved", *EXPERTS))
    moved = read_whole(tmp_path / "moved" / "checkpoints" / "step_00000002")
    found = weights(tmp_path / "moved", "from_moved")
    assert all(torch.equal(found[name], moved[name]) for name in expected) and not torch.equal(
        found["norm.weight"], expected["norm.weight"]
    )


def test_bf16_weights_are_widened_exactly(build: Callable[..., Any], tmp_path: Path) -> None:
    build("Mixtral", vocab_size=264, num_local_experts=4).bfloat16().save_pretrained(tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "imported")
    stored = read_whole(tmp_path / "imported" / "step_00000000")
    assert stored["norm.weight"].dtype is torch.bfloat16
    for source in ("theirs", "imported"):
        found = opened(configured(tmp_path / source, tmp_path / f"from_{source}"))
        assert all(torch.equal(tensor, stored[name].float()) for name, tensor in found.items())


def test_a_second_start_resumes_even_without_the_source(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Mixtral", vocab_size=264, num_local_experts=4)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    more = ["model.moe.balance.coefficient=0.05"]
    trained(configured(theirs, straight, *more, "steps=4"))
    trained(configured(theirs, halves, *more))
    theirs.rename(tmp_path / "gone")
    start = trained(configured(theirs, halves, *more, "steps=4"))
    assert start == f"resumed after step 2 from {halves / 'checkpoints' / 'step_00000002'}"
    one, two = (read_whole(folder / "checkpoints" / "step_00000004") for folder in (straight, halves))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_facts(halves / "checkpoints" / "step_00000004")["config"]["model"]["moe"]["balance"]["coefficient"] == 0.05
    events = [event for event in read_journal(halves / "events.jsonl") if event["event"] == "initialised"]
    assert [event["path"] for event in events] == [str(theirs)]


def test_a_new_balance_by_bias_starts_at_zero(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Mixtral", vocab_size=264, num_local_experts=4)
    import_folder(theirs, tmp_path / "imported")
    for source in (theirs, tmp_path / "imported"):
        found = opened(configured(source, tmp_path / f"from_{source.name}", "model.moe.balance.bias_rate=0.01"))
        biases = [found.pop(f"layers.{layer}.moe.router.expert_bias") for layer in range(2)]
        assert all(torch.equal(bias, torch.zeros(4)) for bias in biases)
        assert found.keys() == tokenyard.load_model(theirs).state_dict().keys()


def test_a_damaged_checkpoint_is_refused_before_anything_is_read(saved: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = import_folder(saved("Mixtral", vocab_size=264, num_local_experts=4), tmp_path / "imported").checkpoint
    shard = checkpoint / "shard_00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        opened(configured(tmp_path / "imported", tmp_path / "run"))
    said = str(caught.value)
    assert said.startswith(f"checkpoint.init={tmp_path / 'imported'}: ") and str(shard) in said and "\n" not in said


def test_the_tokenizer_of_a_hugging_face_folder_is_used(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A tokenizer.json that an export made of the byte tokenizer gives the same tokens, with the same end of a document."""
    config = configured(saved("Mixtral", vocab_size=264, num_local_experts=4), tmp_path / "run", "steps=1")
    trained(config)
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    words = [text for text in SETTINGS.split() if text != "tokenizer=bytes"]
    words += [f"checkpoint.init={tmp_path / 'back'}", f"run.dir={tmp_path / 'again'}", f"data.cache={tmp_path / 'cache'}"]
    again = compose_run(parse_arguments(words))[0]
    assert again.tokenizer.path == str(tmp_path / "back" / "tokenizer.json")
    one, two = (open_data_on_all_ranks(each) for each in (config, again))
    assert torch.equal(one.train.batch(0, range(8)).ids_BS, two.train.batch(0, range(8)).ids_BS)
    assert one.tokenizer.end_of_document == two.tokenizer.end_of_document == 2
    trained(again)


def test_generate_opens_a_hugging_face_folder(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = saved("Mixtral", vocab_size=264, num_local_experts=4)
    trained(configured(theirs, tmp_path / "run", "steps=1", "optimizer.lr=0.01"))
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    run, back = (open_checkpoint(path, torch.device("cpu")) for path in (tmp_path / "run", tmp_path / "back"))
    ids = run.tokenizer.encode("def f(x): return x")
    assert back.tokenizer.encode("def f(x): return x") == ids and back.tokenizer.decode(ids) == "def f(x): return x"
    assert torch.equal(back.model(torch.tensor([ids])), run.model(torch.tensor([ids])))
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "back"), "--prompt", "def ", "--tokens", "24"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main(["generate", str(theirs), "--prompt", "def "]) == 2
    assert f"{theirs}: has no tokenizer, neither tokenizer.json nor tokenizer.model" in capsys.readouterr().err
