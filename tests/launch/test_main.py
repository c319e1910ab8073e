"""The verbs of the command line; asking about them does not import torch."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenyard.launch.main import VERBS, main


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"tokenyard {verb}" in out for verb in ("train", "generate", "evaluate", "params", "report", "watch"))
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from tokenyard import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tokenyard {__version__}\n"


@pytest.mark.parametrize(("typed", "nearest"), [("trian", "train"), ("eval", "evaluate"), ("generte", "generate"), ("--hlep", "")])
def test_unknown_verb(typed: str, nearest: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"tokenyard: {typed}: must be one of {', '.join(VERBS)}; nearest valid: tokenyard {nearest}")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "checkpoint"],
        ["generate", "--prompt", "a"],
        ["generate", "checkpoint", "--prompt", "a", "--tokens", "0"],
        ["generate", "checkpoint", "--prompt", "a", "--temperature", "-1"],
        ["generate", "checkpoint", "--prompt", "a", "--top-p", "1.5"],
        ["generate", "checkpoint", "--prompt", "a", "--tokens", "many"],
        ["evaluate"],
        ["evaluate", "checkpoint", "--bogus"],
    ],
)
def test_bad_usage_is_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"tokenyard: {words[0]}: ")


ASKED = [
    (["--help"], "tokenyard generate CHECKPOINT", ("torch", "hydra", "numpy")),
    (
        ["train", "--help"],
        "experiment: capacity, cpu_hour, deepseek_moe_16b, deepseek_v3_2048_gpus",
        ("torch", "numpy"),
    ),
    (["train", "--cfg", "job", "model=tiny"], "width: 64", ("torch", "numpy", "wandb", "datasets")),
    (["train", "--cfg", "job", "--package", "batch", "batch.micro=4"], "micro: 4", ("torch",)),
    (["train", "--info", "defaults", "debug=cpu"], "parallel/tensor_expert", ("torch",)),
    (["train", "--hydra-help"], "hydra", ("torch",)),
    (["params", "model=deepseek_v3"], "671B total, 37.6B active", ("torch", "numpy", "rich")),
]


@pytest.mark.parametrize(("words", "says", "without"), ASKED, ids=[" ".join(words) for words, _, _ in ASKED])
def test_asking_imports_no_torch_and_writes_nothing(
    words: list[str], says: str, without: tuple[str, ...], tmp_path: Path, child_seconds: Callable[[], float]
) -> None:
    code = f"""
import sys
from tokenyard.launch.main import main
code = main({words!r})
print("imported:", sorted(set({without!r}) & set(sys.modules)))
sys.exit(code)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert child_seconds() < 4
    assert (done.returncode, done.stderr) == (0, "")
    assert says in done.stdout
    assert done.stdout.endswith("imported: []\n")
    assert list(tmp_path.iterdir()) == []


def test_cfg_refuses_what_training_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", "stepz=3"]) == 2
    assert capsys.readouterr().err == "tokenyard: stepz=3: there is no such setting; nearest valid: steps=3\n"
    assert main(["train", "--resolve"]) == 2


def test_only_the_first_rank_complains(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenyard.train.__main__ import main as rank

    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    assert rank(["parallel.expert=3"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    assert rank(["parallel.expert=3", "--local_rank", "0"]) == 2
    assert capsys.readouterr().err.startswith("tokenyard: parallel.expert=3: must divide")
    monkeypatch.setenv("WORLD_SIZE", "four")
    assert rank([]) == 2
    assert capsys.readouterr().err.startswith("tokenyard: WORLD_SIZE=four: must be a positive integer")
