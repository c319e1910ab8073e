"""generate, evaluate, import, checkpoint.init and load_model take Hugging Face folders, and names of those in the hub's cache."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from init_runs import configured, opened, trained
from tokenyard.data.batches import IGNORE
from tokenyard.interop.export import export_checkpoint
from tokenyard.launch.main import main
from tokenyard.train.config.config import ConfigError
from tokenyard.train.evaluation import evaluate_session
from tokenyard.train.load import open_for_evaluation

WORDS = ["data.corpus=synthetic", "data.synthetic_documents=64", "sequence_length=32", "batch.sequences=4", "evaluate.sequences=6"]
BYTES = [*WORDS, "tokenizer.kind=bytes"]


def evaluation(path: Path | str, words: list[str], cache: Path) -> tuple[float, int]:
    evaluated = evaluate_session(open_for_evaluation(str(path), [*words, f"data.cache={cache}"]))
    return evaluated.loss, evaluated.tokens


@pytest.mark.parametrize("family", ["Mixtral", "Ernie4_5_Moe", "Llama"])
def test_the_loss_is_that_of_transformers(family: str, build: Callable[..., Any], tmp_path: Path) -> None:
    theirs = build(family, vocab_size=264)
    theirs.save_pretrained(tmp_path / "theirs")
    session = open_for_evaluation(str(tmp_path / "theirs"), [*BYTES, f"data.cache={tmp_path / 'cache'}"])
    total = tokens = 0.0
    for batch in session.data.validation.batches(6, 6, range(6)):
        with torch.no_grad():
            logits = theirs(batch.ids_BS).logits.flatten(0, 1).double()
        targets_T = batch.targets_BS.flatten()
        total += torch.nn.functional.cross_entropy(logits, targets_T, ignore_index=IGNORE, reduction="sum").item()
        tokens += (targets_T != IGNORE).sum().item()
    found = evaluate_session(session)
    assert (found.loss, found.tokens) == (pytest.approx(total / tokens, rel=2e-6), tokens)


def test_an_exported_run_evaluates_as_the_run(
    saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the tokenizer of the folder, which is that of the run."""
    trained(configured(saved("Mixtral", vocab_size=264, num_local_experts=4), tmp_path / "run"))
    export_checkpoint(tmp_path / "run", tmp_path / "back")
    expected = evaluation(tmp_path / "run", WORDS, tmp_path / "cache")
    assert evaluation(tmp_path / "back", WORDS, tmp_path / "cache") == (pytest.approx(expected[0], rel=1e-7), expected[1])
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "back"), *WORDS, f"data.cache={tmp_path / 'cache'}"]) == 0
    assert capsys.readouterr().out.startswith(f"validation loss {expected[0]:.4f} nats per token")
    small = saved("Llama", vocab_size=200)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "back" / name, small)
    for words in (["evaluate", str(small), *WORDS, f"data.cache={tmp_path / 'cache'}"], ["generate", str(small), "--prompt", "a"]):
        assert main(words) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said == f"tokenyard: {small}: its model has 200 rows, and the tokenizer 259 pieces"


ABSENT = "there is no such folder, and no model of that name in the hub's cache; nearest valid: hf download nobody/nothing"


def test_what_is_refused(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, small = saved("Mixtral", vocab_size=264, num_local_experts=4), saved("Llama", vocab_size=200)
    refused = {
        f"{theirs}: has no tokenizer, neither tokenizer.json nor tokenizer.model": [str(theirs), *WORDS],
        "model: the checkpoint's model cannot be changed by overrides": [str(theirs), *BYTES, "model.layers=1"],
        f"{small}: its model has 200 rows, and the tokenizer 259 pieces": [str(small), *BYTES, f"data.cache={tmp_path / 'cache'}"],
        f"{tmp_path}: is neither a checkpoint nor a run folder with one": [str(tmp_path)],
        f"nobody/nothing: {ABSENT}": ["nobody/nothing"],
    }
    for says, words in refused.items():
        assert main(["evaluate", *words]) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1] == f"tokenyard: {says}"
    (theirs / "config.json").write_text((theirs / "config.json").read_text().replace('"silu"', '"gelu"'))
    assert main(["evaluate", str(theirs), *BYTES]) == 2
    assert f"{theirs / 'config.json'}: hidden_act='gelu': must be 'silu'" in capsys.readouterr().err


@pytest.mark.parametrize("place", [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")])
def test_a_name_of_the_hubs_cache(
    place: tuple[str, str], saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As huggingface_hub lays it out: the files of a commit are links to blobs."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(place[0], str(tmp_path / "cache"))
    theirs, commit = saved("Mixtral", vocab_size=264, num_local_experts=4), "0123456789abcdef" * 2 + "01234567"
    model = tmp_path / "cache" / place[1] / "models--some.body--Tiny-1x"
    snapshot = model / "snapshots" / commit
    for folder in (model / "refs", model / "blobs", snapshot):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(theirs.iterdir())):
        file.rename(model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    expected = tokenyard.load_model(snapshot).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in tokenyard.load_model("some.body/Tiny-1x").state_dict().items()
    )
    assert evaluation("some.body/Tiny-1x", BYTES, tmp_path / "data") == evaluation(snapshot, BYTES, tmp_path / "data")
    found = opened(configured(Path("some.body/Tiny-1x"), tmp_path / "run"))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert main(["import", "some.body/Tiny-1x", str(tmp_path / "imported")]) == 0
    for wrong in (f"../snapshots/{commit}", commit[:39]):  # a reference that is no commit is not followed
        (model / "refs" / "main").write_text(wrong)
        with pytest.raises(ConfigError, match=r"some\.body/Tiny-1x: is neither a checkpoint"):
            tokenyard.load_model("some.body/Tiny-1x")
