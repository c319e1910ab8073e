"""`tokenyard push` against a local fake of the hub, through the real huggingface_hub; and the model card of an export."""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_hub import TOKEN, Hub, serving
from test_conventions import TINY
from tokenyard.launch.main import main
from tokenyard.train.config.compose import compose
from tokenyard.train.config.number_format import gigabytes
from tokenyard.train.run import run

# The hub's client calls its transport in a way that this one deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "repo=me/small"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    run(compose([*TINY, "steps=3", "log.every=1", "evaluate.every=2", f"run.dir={folder}", "tracker=none"]))
    return folder


@pytest.fixture
def first(trained: Path, tmp_path: Path) -> Path:
    """A run folder of one's own, without exports."""
    return Path(shutil.copytree(trained, tmp_path / "first"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The fake hub, which huggingface_hub asks with the right token, by LFS, since the fake does not know Xet."""
    from huggingface_hub import constants

    with serving() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


def sent_files(hub: Hub) -> dict[str, bytes]:
    return {name.removeprefix("me/small/"): content for name, content in hub.files.items()}


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pushed(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    code, told = main(["push", *words, "--json"]), capsys.readouterr()
    assert code == 0, told.err
    return json.loads(told.out)


def refused(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main(["push", *words]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and TOKEN not in error
    return error


def test_what_arrives_is_the_export(first: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    facts = pushed(capsys, str(first), REPO)
    folder = Path(facts["folder"])
    assert folder.parent == first / "exports" and hub.repos == {"me/small": True}
    assert sent_files(hub) == files_in(folder) and facts["files"] == {
        name: len(content) for name, content in files_in(folder).items()
    }
    assert facts["url"] == f"{hub.url}/me/small" and len(facts["commit"]) == 40 and facts["not_sent"] == []
    assert main(["export", str(first), str(tmp_path / "other")]) == 0
    other = files_in(tmp_path / "other")
    assert {name for name, content in other.items() if sent_files(hub)[name] != content} == {"README.md"}  # it names the repository
    assert hub.sent("/storage/.*/2$") == 1, "no file was large enough for parts"
    told = capsys.readouterr()
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in told.out + told.err and TOKEN.encode() not in kept and hub.tokens <= {TOKEN, ""}


def test_a_second_try_sends_what_is_missing(first: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.on_request = lambda request: os.kill(os.getpid(), signal.SIGINT) if request.endswith("/preupload/main") else None
    assert "interrupted; the same command goes on" in refused(capsys, str(first), REPO, code=130)
    hub.on_request = lambda request: None
    hub.refuse = "POST .*/commit/main"
    error = refused(capsys, str(first), REPO)
    assert "the hub says 400: the fake was told to refuse this" in error and hub.sent("^PUT ") > 0 and not hub.files
    (folder,) = (first / "exports").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    card = (folder / "README.md").read_text() + "\nA sentence of mine.\n"
    (folder / "README.md").write_text(card)
    hub.refuse, hub.requests = "", []
    assert pushed(capsys, str(first), REPO)["folder"] == str(folder)
    assert hub.sent("^PUT ") == 0 and sent_files(hub)["README.md"] == card.encode() and sent_files(hub) == files_in(folder)
    assert {name for name, at in before.items() if (folder / name).stat().st_mtime_ns != at} == {"README.md"}


def test_only_files_of_an_export_are_sent(first: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(first), str(tmp_path / "theirs"), "--dtype", "bf16"]) == 0
    (tmp_path / "theirs/.env").write_text("HF_TOKEN=another")
    (tmp_path / "theirs/optimizer.pt").write_bytes(b"a pickle")
    (tmp_path / "theirs/LICENSE").write_text("Do as you like.")
    assert pushed(capsys, str(tmp_path / "theirs"), REPO, "private=false")["not_sent"] == [".env", "optimizer.pt"]
    assert sent_files(hub).keys() == files_in(tmp_path / "theirs").keys() - {".env", "optimizer.pt"}
    assert hub.repos == {"me/small": False} and not (tmp_path / "exports").exists()
    pushed(capsys, str(tmp_path / "theirs"), REPO)  # what is public stays so unless it is said otherwise
    error = refused(capsys, str(tmp_path / "theirs"), REPO, "private=true")
    assert "private=true: me/small exists and is public; nearest valid: private=false" in error


def test_a_dry_run_asks_nobody(first: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HF_TOKEN")
    facts = pushed(capsys, str(first), REPO, "license=apache-2.0", "--dry-run")
    assert facts["files"] == {name: len(content) for name, content in files_in(Path(facts["folder"])).items()}
    assert hub.requests == [] and facts["private"] is True and "url" not in facts
    assert main(["push", str(first), REPO, "--dry-run"]) == 0
    out = capsys.readouterr().out
    lines = [f"  {name:{max(map(len, facts['files']))}}  {gigabytes(size):>12}" for name, size in facts["files"].items()]
    assert out.splitlines()[: len(lines)] == lines
    assert f"{len(facts['files'])} files" in out and "nothing was sent" in out


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ((), "repo=: must be the owner"),
        (("repo=small",), "repo=small: must be the owner"),
        (("repo=me/small/er",), "repo=me/small/er: must be the owner"),
        (("repo=me/sm--all",), "no two - or . together.*nearest valid: repo=me/sm-all"),
        (("repo=me/small.git",), "no .git at the end"),
        ((REPO, "license=MIT License"), "license=MIT License: must be an identifier"),
        ((REPO, "private=maybe"), "private=maybe: must be one of true, false"),
        ((REPO, "visibility=public"), "visibility=public: must be one of repo=, private=, license="),
        (("repo=you/small",), "this token may not write there; nearest valid: one with the right to write to you"),
    ],
)
def test_what_is_refused(first: Path, hub: Hub, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], rule: str) -> None:
    assert re.search(rule, refused(capsys, str(first), *words))
    assert not hub.repos and not hub.files and not (first / "exports").exists()


def test_no_token_no_hub(first: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    assert "the hub does not know this token; nearest valid: another HF_TOKEN" in refused(capsys, str(first), REPO)
    monkeypatch.delenv("HF_TOKEN")
    before = len(hub.requests)
    assert "no token of the hub; nearest valid: HF_TOKEN in the environment" in refused(capsys, str(first), REPO)
    assert len(hub.requests) == before
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in refused(capsys, str(first), REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(capsys, str(first), REPO)
    assert not (first / "exports").exists()


def test_a_damaged_export_is_refused(first: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(first), str(tmp_path / "theirs")]) == 0
    weights = tmp_path / "theirs/model-00001-of-00001.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    assert "is no readable safetensors file" in refused(capsys, str(tmp_path / "theirs"), REPO)
    weights.unlink()
    assert "model-00001-of-00001.safetensors" in refused(capsys, str(tmp_path / "theirs"), REPO)
    assert not hub.files
    shard = next(first.glob("checkpoints/*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert "shard_00000.safetensors" in refused(capsys, str(first), REPO) and not (first / "exports").exists()


def front_and_body(text: str) -> tuple[dict[str, Any], str]:
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def row(body: str, name: str) -> str:
    (found,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", body, re.MULTILINE)
    return found


def test_the_card_says_what_was_recorded(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (first / "metrics.jsonl").open("a") as file:  # of later steps than the checkpoint's
        file.write(json.dumps({"step": 4, "validation_loss": 0.001, "moe/load_max_over_mean": 9.5}) + "\n")
    facts = pushed(capsys, str(first), REPO, "license=apache-2.0", "--dry-run")
    front, body = front_and_body((Path(facts["folder"]) / "README.md").read_text())
    assert front == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "tokenyard"],
    }
    assert main(["params", "model=tiny_mixtral", "tokenizer=bytes", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    held = sum(bytes for name, bytes in facts["files"].items() if name.endswith(".safetensors"))
    assert row(body, "weights") == f"float32, {gigabytes(held)}"
    assert row(body, "parameters") == f"{size['total']:,}" and row(body, "active for each token").startswith(f"{size['active']:,} ")
    assert (
        row(body, "tokens") == f"{3 * 4 * 32:,}" and row(body, "steps") == "3" and row(body, "batch") == "4 sequences of 32 tokens"
    )
    assert "cores" in row(body, "hardware") and row(body, "data") == "small stories made by a grammar"
    metrics = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    end = next(json.loads(line) for line in (first / "events.jsonl").read_text().splitlines() if '"finished"' in line)
    assert row(body, "loss, nats per token") == f"{end['validation_loss']:.4f}" != f"{metrics[1]['validation_loss']:.4f}"
    assert row(body, "bits per byte") == f"{end['validation/bits_per_byte']:.4f}"
    assert f"In step 3 the busiest expert of layer {metrics[2]['moe/load_max_over_mean_layer']}" in body
    assert f"got {metrics[2]['moe/load_max_over_mean']:.2f} times an even share" in body


def test_what_is_not_recorded_is_absent(first: Path, tmp_path: Path) -> None:
    (alone,) = (first / "checkpoints").iterdir()
    shutil.move(alone, tmp_path / "elsewhere" / alone.name)
    assert main(["export", str(tmp_path / "elsewhere" / alone.name), str(tmp_path / "theirs")]) == 0
    front, body = front_and_body((tmp_path / "theirs/README.md").read_text())
    assert "license" not in front and "datasets" not in front and "base_model" not in front
    assert "hardware" not in body and "Balance" not in body and "| time |" not in body and "None" not in body
    assert row(body, "steps") == "3" and re.fullmatch(r"\d\.\d{4}", row(body, "loss, nats per token"))
    (first / "checkpoints").rename(tmp_path / "first" / "moved")
    (first / "run_id").write_text("another")  # the journals beside it are those of another run
    shutil.copytree(tmp_path / "elsewhere", first / "checkpoints")
    assert main(["export", str(first), str(tmp_path / "again")]) == 0
    assert "hardware" not in (tmp_path / "again/README.md").read_text()


def test_data_is_named_without_its_folders(tmp_path: Path, first: Path) -> None:
    from tokenyard.interop.export import Exported
    from tokenyard.launch.model_card import model_card, read_training

    training = read_training(next((first / "checkpoints").iterdir()))
    mix = "['weight=0.7 corpus=hf name=org/web subset=en','weight=0.3 corpus=jsonl path=/home/someone/private/own.jsonl']"
    config = compose([*TINY[:1], *TINY[2:], "data=mix", f"data.mix={mix}", "checkpoint.init=null"])
    card = model_card(training._replace(config=config), Exported(tmp_path, "X", "float32", [], 1, ["a | b"]), None)
    front, body = front_and_body(card)
    assert front["datasets"] == ["org/web"] and "someone" not in card and "- a \\| b" in body
    assert row(body, "data") == "hf: org/web, en (70% of the tokens); jsonl: own.jsonl (30% of the tokens)"


def test_the_code_of_the_card_runs(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(first), str(tmp_path / "theirs")]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "theirs/README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path / "theirs")
    made: dict[str, Any] = {}
    exec(code, made)  # the text itself is noise, of which transformers shows bytes that are no UTF-8
    assert made["tokenizer"].decode(made["inputs"]["input_ids"][0], skip_special_tokens=True) == "Once upon a time"
    assert f"{made['model'].num_parameters():,}" == row((tmp_path / "theirs/README.md").read_text(), "parameters")
