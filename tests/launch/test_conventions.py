"""Conventions of the command line: own groups for every verb, --json, names from elsewhere, completion, pipes, bars, refusals."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenyard.launch.completion import choices
from tokenyard.launch.main import BROKEN_PIPE, VERBS, main
from tokenyard.launch.progress_bar import progress_bar
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.group_words import spelled_out
from tokenyard.train.config.schema import accepts, settings
from tokenyard.train.config.usual_names import USUAL, usual_name
from tokenyard.train.run import run

TINY = [
    "model=tiny_mixtral",
    "data=synthetic",
    "tokenizer=bytes",
    "sequence_length=32",
    "batch.sequences=4",
    "evaluate.sequences=4",
]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder with groups of a user's own."""
    for name, text in {
        "model/mine_small": "layers: 2\nwidth: 64\nheads: 4\nkv_heads: 2\nmoe: {experts: 4, top_k: 2, hidden: 64}",
        "data/mine_texts": f"corpus: text\npath: {tmp_path}/texts",
        "model/default": "layers: 99",
        "experiment/short": "# @package _global_\ndefaults:\n  - override /model: mine_small\nsteps: 7",
    }.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / f"{name}.yaml").write_text(text)
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text {number} of 40, with some words. " * 3)
    return tmp_path / "mine"


@pytest.mark.parametrize("way", ["--config-dir={}", "hydra.searchpath=[{}]", "hydra.searchpath=['file://{}']"])
def test_own_groups(mine: Path, way: str) -> None:
    config = compose([way.format(mine), "experiment=short"])
    assert (config.steps, config.model.layers, config.model.moe.experts) == (7, 2, 4)
    assert compose([way.format(mine), "model=default"]).model.layers == compose([]).model.layers  # the first of a name counts


def test_folders_of_both_ways_are_one_path(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "other/experiment").mkdir(parents=True)
    (tmp_path / "other/experiment/long.yaml").write_text("# @package _global_\nsteps: 9")
    words = [f"--config-dir={mine}", f"hydra.searchpath=[{tmp_path}/other]"]
    assert [compose([*words, f"experiment={name}"]).steps for name in ("short", "long")] == [7, 9]


@pytest.mark.parametrize("way", ["--config-dir", "hydra.searchpath"])
def test_a_folder_that_is_not_there(way: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        compose([f"{way}={tmp_path}/none"])
    nearest = {"--config-dir": f"--config-dir={tmp_path}", "hydra.searchpath": f"hydra.searchpath=[{tmp_path}]"}[way]
    assert str(error.value) == f"{way}={tmp_path}/none: must be an existing folder; nearest valid: {nearest}"


@pytest.mark.parametrize(
    "words",
    [
        "params model=mine_small",
        "train experiment=short --cfg job",
        "train experiment=short --layout-only",
        "plan serve mine_small",
        "data inspect --steps 1 data=mine_texts tokenizer=bytes",
        "prepare OUT --processes 1 data=mine_texts tokenizer=bytes",
        "tokenizer train OUT data=mine_texts tokenizer.pieces=300",
    ],
)
def test_verbs_take_own_groups(mine: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = [word.replace("OUT", str(tmp_path / "out")) for word in words.split()]
    cache = [] if words.startswith(("params", "plan")) else [f"data.cache={tmp_path}/cache"]
    assert main([*own, "--config-dir", str(mine), *cache]) == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = [f"run.dir={folder}/run", f"data.cache={folder}/cache", "steps=2", "tracker=jsonl", "sample.prompt="]
    assert run(compose([*TINY, *words])) == 0
    return folder / "run"


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict:
    """The one object that a command prints."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_evaluate_takes_groups(trained: Path, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = f"data.cache={trained.parent}/cache"
    of_group = printed(capsys, "evaluate", str(trained), "data=mine_texts", "--config-dir", str(mine), cache)
    of_keys = printed(capsys, "evaluate", str(trained), "data.corpus=text", f"data.path={mine.parent}/texts", cache)
    assert of_group == of_keys and of_group["corpus"] == "text"
    assert list(of_group)[:7] == ["checkpoint", "loss", "perplexity", "tokens", "corpus", "unigram_entropy", "bits_per_byte"]
    assert of_group["validation_loss"] == of_group["loss"]
    assert printed(capsys, "evaluate", str(trained), cache)["corpus"] == "synthetic"
    assert main(["evaluate", str(trained), "model=tiny_mixtral", "model.layers=3"]) == 2
    assert "the checkpoint's model cannot be changed" in capsys.readouterr().err


def test_an_option_stands_for_its_section(mine: Path) -> None:
    from tokenyard.train.config.compose import parse_arguments

    words = spelled_out(parse_arguments([f"--config-dir={mine}", "data=mine_texts", "data.window=8"]))
    assert words[-1] == "data.window=8" and "data.corpus=text" in [word.replace('"', "") for word in words]
    assert all(word.startswith("data.") for word in words)
    assert "data.corpus=stdlib" in [
        word.replace('"', "") for word in spelled_out(parse_arguments(["data=stdlib"]))
    ]  # the default too


def test_json_of_the_other_verbs(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, shards = f"data.cache={trained.parent}/cache", str(tmp_path / "shards")
    found = printed(capsys, "generate", str(trained), "--prompt", "a", "--tokens", "3", "--temperature", "0")
    assert found["prompt"] == "a" and 1 <= found["tokens"] <= 3 and found.keys() >= {"checkpoint", "text", "seconds"}
    found = printed(capsys, "checkpoint", "verify", str(trained))
    (one,) = found["checkpoints"]
    assert found["whole"] and one["whole"] and one["tensors"] > 10 and one["experts"] == 16
    found = printed(capsys, "prepare", shards, "--processes", "1", "data=synthetic", "tokenizer=bytes", cache)
    train = found["splits"]["train"]
    assert train["tokens"] == train["documents"] + train["bytes"] and train["bad_rows"] == []
    verified = printed(capsys, "data", "verify", shards)
    tokens = sum(split["tokens"] for split in found["splits"].values())
    assert verified["whole"] and verified["damaged"] == [] and verified["tokens"] == tokens
    next(Path(shards).glob("train*.npy")).write_bytes(b"x")
    assert [each["file"] for each in printed(capsys, "data", "verify", shards, code=1)["damaged"]] == ["train_00000_00.npy"]
    found = printed(capsys, "tokenizer", "train", str(tmp_path / "pieces"), "data=synthetic", "tokenizer.pieces=320", cache)
    assert (found["kind"], found["pieces"]) == ("sentencepiece", 320)
    made = printed(capsys, "export", str(trained), str(tmp_path / "hf"))
    assert made["architecture"] == "MixtralForCausalLM" and made["files"] == ["model-00001-of-00001.safetensors"]
    assert printed(capsys, "import", str(tmp_path / "hf"), str(tmp_path / "again"))["parameters"] > 1000


def test_progress_reaches_its_total_and_is_silent_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("of the bytes") as progress:
            for done in range(5):
                progress(done, 4)
        assert ("100%" in stream.getvalue()) == stream.isatty() and bool(stream.getvalue()) == stream.isatty()


def test_export_and_verify_count_every_byte(trained: Path, tmp_path: Path) -> None:
    from tokenyard.checkpoint.verify import check_all
    from tokenyard.interop.export import export_checkpoint

    (checkpoint,) = (trained / "checkpoints").iterdir()
    calls: list[tuple[int, int]] = []
    export_checkpoint(checkpoint, tmp_path / "hf", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1] and len({total for _, total in calls}) == 1
    sizes: list[int] = []
    manifest = check_all(checkpoint, sizes.append)
    assert sum(sizes) == sum(record.bytes for record in (manifest.files | manifest.attachments).values())


def test_every_usual_name_means_a_setting_and_hides_none() -> None:
    for name, ours in USUAL.items():
        assert name not in settings(), name
        if "=" in ours.rstrip("="):
            compose([word for word in ours.format(value=2).split() if not word.startswith("launch.ranks")])
        else:
            assert ours.rstrip("=") in settings(), (name, ours)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("batch_size=4", "batch.sequences=4"),
        ("per_device_train_batch_size=4", "batch.micro=4"),
        ("lr=0.1", "optimizer.lr=0.1"),
        ("optimizer.learning_rate=0.1", "optimizer.lr=0.1"),
        ("num_experts=4", "model.moe.experts=4"),
        ("model.num_experts_per_tok=2", "model.moe.top_k=2"),
        ("gpus=2", "launch=torchrun launch.ranks=2"),
        ("seq_len=128", "sequence_length=128"),
        ("mixed_precision=bf16", "precision=bf16"),
        ("mixed_precision=no", "precision=auto"),
        ("epochs=3", "steps=1150"),
        ("grad_accum=4", "batch.micro=null"),
        ("tensor_model_parallel_size=2", "parallel.tensor=2"),
        ("wandb=true", "tracker=wandb"),
        ("optimiser.lr=1", "optimizer.lr=1"),
    ],
)
def test_names_from_elsewhere(typed: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", typed]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"tokenyard: {typed}: there is no such setting") and error.endswith(f"; nearest valid: {meant}\n")


def test_flags_from_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--per-device-train-batch-size=8"]) == 2
    said = "there is no such flag, settings are key=value; nearest valid: batch.micro=8"
    assert capsys.readouterr().err == f"tokenyard: --per-device-train-batch-size=8: {said}\n"
    assert usual_name("model.NUM-EXPERTS") == "model.moe.experts" and accepts("model.moe.experts", "4")


@pytest.mark.parametrize(
    ("line", "some", "none"),
    [
        ("tokenyard ", {"train", "evaluate", "--help"}, set()),
        ("tokenyard ev", {"evaluate"}, {"train"}),
        ("tokenyard checkpoint ", {"inspect", "verify", "diff"}, set()),
        ("tokenyard data in", {"inspect"}, {"verify"}),
        ("tokenyard train mod", {"model=", "model."}, {"inspect"}),
        ("tokenyard train seed=1 data=js", {"data=jsonl"}, {"data=text"}),
        ("tokenyard train model=tiny_mixtral optimizer.l", {"optimizer.lr="}, {"optimizer.beta1="}),
        ("tokenyard evaluate runs/x evaluate.s", {"evaluate.sequences="}, set()),
        ("tokenyard evaluate --j", {"--json"}, {"--config-dir"}),
        ("tokenyard train clust", set(), {"cluster="}),
    ],
)
def test_completion(line: str, some: set[str], none: set[str]) -> None:
    found = choices(line, VERBS)
    assert some <= found and not none & found


def test_completion_in_bash() -> None:
    """The script that bash reads, asked for the words after `tokenyard tra` and `tokenyard train optimizer.weig`."""
    script = """
    tokenyard() { "$PYTHON" -m tokenyard "$@"; }
    eval "$(tokenyard -sc install=bash)"
    command() { if [ "$1" = -v ]; then echo "$PYTHON"; else builtin command "$@"; fi; }
    for COMP_LINE in "tokenyard tra" "tokenyard train optimizer.weig"; do
        COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMP_POINT=${#COMP_LINE}
        hydra_bash_completion; echo "${COMPREPLY[*]}"
    done
    """
    environment = {**os.environ, "PYTHON": sys.executable}
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert ended.stdout.split() == ["train", "optimizer.weight_decay="], ended.stderr


def test_completion_of_no_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=tcsh"]) == 2
    said = "must be install=, uninstall= or query= and a shell; nearest valid: -sc install=bash"
    assert capsys.readouterr().err == f"tokenyard: -sc install=tcsh: {said}\n"


@pytest.mark.parametrize("words", [["params", "model=tiny_mixtral"], ["--help"]])
def test_a_broken_pipe_is_silent(words: list[str]) -> None:
    """A reader that has ended before anything is written."""
    source, sink = os.pipe()
    os.close(source)
    command = [sys.executable, "-m", "tokenyard", *words]
    ended = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(sink)
    assert (ended.returncode, ended.stderr) == (BROKEN_PIPE, b"")


def test_a_run_goes_on_without_a_console(tmp_path: Path) -> None:
    source, sink = os.pipe()
    os.close(source)
    words = [f"run.dir={tmp_path}/run", f"data.cache={tmp_path}/cache", "steps=3", "tracker=jsonl", "sample.prompt="]
    command = [sys.executable, "-m", "tokenyard", "train", *TINY, *words]
    ended = subprocess.run(command, stdout=sink, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(sink)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "Broken" not in ended.stderr, ended.stderr
    assert [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()][-1] == 3


def a_file(folder: Path) -> tuple[str, str]:
    (folder / "file").touch()
    return f"{folder}/file/run", f"{folder}/file is a file; nearest valid: run.dir={folder}/run"


def not_writable(folder: Path) -> tuple[str, str]:
    (folder / "closed").mkdir(mode=0o500)
    return f"{folder}/closed/run", f"{folder}/closed cannot be written; nearest valid: run.dir=null, for a folder in ./runs"


@pytest.mark.parametrize("made", [a_file, not_writable])
def test_an_impossible_run_folder(tmp_path: Path, made, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = made(tmp_path)
    if made is not_writable:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["train", *TINY, f"run.dir={folder}"]) == 2
    assert capsys.readouterr().err == f"tokenyard: run.dir={folder}: {said}\n"


@pytest.mark.parametrize("words", ["evaluate NAME", "generate NAME --prompt x", "import NAME out", "train checkpoint.init=NAME"])
def test_a_model_that_is_not_in_the_cache(words: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """At once and without the network: nothing is downloaded by these verbs."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(words.replace("NAME", "our/model").split()) == 2
    said = "there is no such folder, and no model of that name in the hub's cache; nearest valid: hf download our/model"
    assert capsys.readouterr().err == f"tokenyard: our/model: {said}\n"


def test_cuda_where_torch_has_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tokenyard.train.preflight.version", lambda name: "2.13.0+cpu")
    assert main(["train", *TINY, "device=cuda"]) == 2
    assert capsys.readouterr().err == "tokenyard: device=cuda: torch is built without CUDA here; nearest valid: device=cpu\n"
