"""`tokenyard import` and `tokenyard export` as they are typed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenyard
import torch
from tokenyard.checkpoint.store import read_whole
from tokenyard.launch.convert import split_upcycle, upcycle_settings
from tokenyard.launch.main import main


def test_there_and_back(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = saved("Mixtral", num_local_experts=4)
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    out, error = capsys.readouterr()
    assert out.startswith("MixtralForCausalLM: 28,064 parameters in ") and out.endswith(
        f"in {tmp_path / 'ours' / 'step_00000000'}\n"
    )
    assert error.splitlines()[-1] == "tokenyard: no tokenizer: the folder has neither tokenizer.json nor tokenizer.model"
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again"), "--dtype", "bf16"]) == 0
    assert "MixtralForCausalLM: 1 files of weights in" in capsys.readouterr().out
    ids = torch.arange(9).view(1, 9)
    torch.testing.assert_close(tokenyard.load_model(tmp_path / "again")(ids), tokenyard.load_model(theirs)(ids), rtol=0.1, atol=0.2)


def test_upcycle(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Llama", intermediate_size=32)
    words = ["import", "--upcycle", "experts=8", "top_k=4", "granularity=2", str(theirs), str(tmp_path / "ours")]
    assert main(words) == 0
    assert read_whole(tmp_path / "ours" / "step_00000000")["layers.0.moe.experts.down"].shape == (8, 32, 16)


def test_words_of_upcycle_end_with_the_settings() -> None:
    assert split_upcycle(["a", "b"]) == (["a", "b"], None)
    assert split_upcycle(["--upcycle", "experts=8", "top_k=2", "in", "out"]) == (["in", "out"], ["experts=8", "top_k=2"])
    assert split_upcycle(["in", "out", "--upcycle", "experts=8"]) == (["in", "out"], ["experts=8"])
    assert upcycle_settings(["experts=8"]) == {"experts": 8}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["import", "nowhere", "out"], "nowhere: there is no such folder; the nearest existing path is "),
        (
            ["import", "--upcycle", "nowhere", "out"],
            "--upcycle: must say how many experts; nearest valid: --upcycle experts=8 top_k=2",
        ),
        (["import", "--upcycle", "exprts=8", "a", "b"], "--upcycle exprts=8: must be a whole number for one of experts, top_k"),
        (["import", "--upcycle", "experts=many", "a", "b"], "--upcycle experts=many: must be a whole number"),
        (["export", "nowhere", "out"], "nowhere: is neither a checkpoint nor a run folder with one"),
    ],
)
def test_refusals_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"tokenyard: {says}")


def test_transformers_is_not_needed(saved: Callable[..., Path], tmp_path: Path) -> None:
    theirs = saved("Mixtral", num_local_experts=4)
    code = f"""
import sys
from tokenyard.launch.main import main
codes = [main(["import", {str(theirs)!r}, "ours"]), main(["export", "ours", "again"])]
print(codes, sorted({{"transformers", "tokenizers", "hydra", "omegaconf", "torch._dynamo"}} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0] []"


def test_asking_imports_no_torch() -> None:
    code = """
import sys
from tokenyard.launch.main import main
from tokenyard.interop.config_mapping import read_config
for words in (["import", "--help"], ["export", "--help"]):
    try:
        main(words)
    except SystemExit:
        pass
print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.splitlines()[-1] == "False"
