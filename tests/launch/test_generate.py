"""`tokenyard.generate` writes what the verb writes, and refuses other arguments in one line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from tokenyard.launch.main import main
from tokenyard.moe.generation import sample
from tokenyard.train.config.compose import compose
from tokenyard.train.run import run as start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["model=tiny", "model.init_std=0.3", "data=synthetic", "tokenizer=bytes", "sequence_length=16", "batch.sequences=4"]
    words += ["evaluate.sequences=4", "steps=1", "tracker=jsonl", "sample.prompt=", f"run.dir={folder}/run"]
    assert start(compose([*words, f"data.cache={folder}/cache"])) == 0
    return folder / "run"


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 3, "seed": 4}, {"top_p": 0.4, "temperature": 1.3}], ids=str
)
def test_the_function_writes_what_the_verb_writes(run: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", str(run), "--prompt", "def ", "--tokens", "5", *flags, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["text"]
    model = tokenyard.load_model(run).train()
    assert tokenyard.generate(model, "def ", 5, **settings) == written == tokenyard.generate(run, "def ", tokens=5, **settings)
    assert model.training
    assert tokenyard.generate(model, "def ", 5, top_k=1) == tokenyard.generate(model, "def ", 5, temperature=0)
    ids = model.tokenizer.encode_prompt("def ")
    found = tokenyard.generate(model, ids, 5, **settings)
    assert model.tokenizer.decode([*ids, *found]).removeprefix("def ").rstrip("\ufffd") == written.rstrip("\ufffd")
    for prompt in (torch.tensor(ids), torch.tensor(ids).numpy(), tuple(ids)):
        assert tokenyard.generate(model, prompt, 5, **settings) == found
    assert tokenyard.generate(model, ["def ", "a"], 5, **settings)[0] == written
    assert tokenyard.generate(model, [ids, ids], 5, **settings) == [found, found]


def test_top_k_draws_from_the_likeliest() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for top_k in (1, 4, 20):
        drawn = {int(sample(logits, 2.0, 1.0, generator, top_k)) for _ in range(300)}
        assert drawn <= set(logits.topk(top_k).indices.tolist()) and len(drawn) > 0.8 * top_k


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: tokenyard.generate(m, "a", 2.5), "generate.tokens=2.5: must be an integer; nearest valid: tokens=2"),
    (lambda m: tokenyard.generate(m, "a", -1), "generate.tokens=-1: must be in [0, inf); nearest valid: tokens=0"),
    (lambda m: tokenyard.generate(m, "a", temperature="hot"), "generate.temperature='hot': must be a number; nearest valid: tem"),
    (lambda m: tokenyard.generate(m, "a", top_p=1.5), "generate.top_p=1.5: must be in (0, 1]; nearest valid: top_p=1.0"),
    (lambda m: tokenyard.generate(m, "a", top_k=0), "generate.top_k=0: must be in [1, inf); nearest valid: top_k=1"),
    (lambda m: tokenyard.generate(m, "a", seed=1.0), "seed=1.0, float: must be an integer; nearest valid: seed=1"),
    (
        lambda m: tokenyard.generate(m, [1.5]),
        "prompt=[1.5], list: must be a text, token ids (integers), or a list of these; nearest",
    ),
    (
        lambda m: tokenyard.generate(m, None),
        "prompt=None, NoneType: must be a text, token ids (integers), or a list of these; near",
    ),
    (lambda m: tokenyard.generate(m, [1, 10**6]), "prompt: has the id 1000000, must be in [0, "),
    (lambda m: tokenyard.generate(m, []), "prompt must have at least one token"),
    (lambda m: tokenyard.generate(m.blocks[0], "a"), "Block: must be a model of tokenyard.load_model, or the path of a run"),
    (
        lambda m: tokenyard.generate(tokenyard.Transformer(m.config), "a"),
        "prompt='a': must be token ids, as this model was made by",
    ),
    (lambda m: tokenyard.load_model(m.config), "ModelConfig: must be the path of a run, a checkpoint or a Hugging Face folder"),
    (
        lambda m: tokenyard.load_model("x", precision=torch.bfloat16),
        "precision=torch.bfloat16: must be one of fp32, bf16, fp64; nea",
    ),
    (lambda m: tokenyard.load_model("x", device="gpu"), "device=gpu: must be cpu or cuda; nearest valid: device="),
]


@pytest.mark.parametrize(("call", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_other_arguments_are_refused_in_one_line(run: Path, call: Callable[[Any], Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(tokenyard.load_model(run))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, tokenyard; tokenyard.ModelConfig(width=64); assert not {'torch', 'numpy', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
