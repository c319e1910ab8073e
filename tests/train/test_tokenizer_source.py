"""The tokenizer that is there: prepared data give theirs, and it gives the rows of the embedding where nothing sets them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenizer_cases import PIECES, mixed_texts, saved_tokenizer
from tokenyard.checkpoint.store import read_facts
from tokenyard.data.config import TokenizerKind
from tokenyard.data.tokenizer import load_tokenizer
from tokenyard.launch.main import main
from tokenyard.train.config.compose import parse_arguments
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.preflight import check_config
from tokenyard.train.run import run
from tokenyard.train.setup import open_session
from tokenyard.train.weight_source import compose_run

ROUNDED = -(-PIECES // 128) * 128
WORDS = [word for word in TINY_RUN if not word.startswith(("model.vocabulary=", "tokenizer", "data", "run.dir"))]
SMALL = ["data=synthetic", "data.synthetic_documents=64"]


def composed(*words: str) -> Config:
    config = compose_run(parse_arguments(list(words)))[0]
    check_config(config, 1)
    return config


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer("llama3", tmp_path_factory.mktemp("theirs"))


@pytest.fixture(scope="module")
def shards(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus that was tokenized by `tokenyard prepare`."""
    folder = tmp_path_factory.mktemp("data")
    words = [*SMALL, "tokenizer=huggingface", f"tokenizer.path={theirs}", f"data.cache={folder / 'cache'}"]
    assert main(["prepare", str(folder / "shards"), *words]) == 0
    return folder / "shards"


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ([], 8192),
        (["tokenizer=bytes"], 384),
        (["tokenizer.pieces=16385"], 16512),
        (["tokenizer.pieces=300", "model.vocabulary=8192"], 8192),
        (["tokenizer=bytes", "model=tiny"], 384),
        (["tokenizer=bytes", "model=tiny_mixtral"], 512),
        (["tokenizer=bytes", "model=mixtral_8x7b"], 32000),
        (["tokenizer=bytes", "debug=default"], 512),
    ],
)
def test_rows_where_nothing_sets_them(words: list[str], rows: int) -> None:
    assert composed(*words).model.vocabulary == rows


def test_rows_of_a_tokenizer_json(theirs: Path) -> None:
    words = ["tokenizer=huggingface", f"tokenizer.path={theirs}"]
    assert composed(*words).model.vocabulary == ROUNDED
    assert composed(*words, "model.vocabulary=1200").model.vocabulary == 1200
    with pytest.raises(ConfigError, match=r"^tokenizer\.path=.* must be a tokenizer\.json"):
        composed("tokenizer=huggingface", f"tokenizer.path={__file__}")
    with pytest.raises(ConfigError, match=r"^tokenizer\.path=null must name a tokenizer\.json"):
        composed("tokenizer=huggingface")
    inside = ["launch=kubernetes", "run.dir=/shared/run", "launch.kubernetes.image=registry/name"]
    assert composed("tokenizer=huggingface", "tokenizer.path=/in/the/container", *inside).model.vocabulary == 8192


def test_params_counts_them(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "model=tiny", "tokenizer=huggingface", f"tokenizer.path={theirs}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["embedding"] == ROUNDED * 64


def test_a_run_keeps_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    """Those of an earlier version were 8192 for every tokenizer."""
    words = [*WORDS, *SMALL, "tokenizer=bytes", f"data.cache={tmp_path / 'cache'}", "steps=1", "sample.prompt=''"]
    first = composed(*words, "model.vocabulary=8192", f"run.dir={tmp_path / 'run'}")
    assert run(first) == 0
    assert composed(*words, f"run.dir={tmp_path / 'run'}").model.vocabulary == 8192
    assert composed(*words, f"run.dir={tmp_path / 'new'}", f"checkpoint.resume={tmp_path / 'run'}").model.vocabulary == 8192
    assert composed(*words, f"run.dir={tmp_path / 'new'}").model.vocabulary == 384
    assert composed(*words, f"run.dir={tmp_path / 'run'}", "checkpoint.resume=never").model.vocabulary == 384


def test_prepared_data_give_their_tokenizer(shards: Path, theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepared = ["data=prepared", f"data.path={shards}"]
    config = composed(*prepared)
    assert config.tokenizer.kind is TokenizerKind.huggingface and config.model.vocabulary == ROUNDED
    mixed = composed("data=mix", f"data.mix=['weight=1 corpus=prepared path={shards}']")
    assert mixed.tokenizer == config.tokenizer
    words = [*WORDS, *prepared, f"data.cache={tmp_path / 'cache'}", "steps=1", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", *words]) == 0
    assert f"{PIECES:,} pieces in {ROUNDED:,} rows of the embedding (rounded up to a multiple of 128)" in capfd.readouterr().out
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    assert read_facts(checkpoint)["config"]["model"]["vocabulary"] == ROUNDED
    assert load_tokenizer(checkpoint / "tokenizer").hash == load_tokenizer(shards / "tokenizer").hash
    assert main(["data", "inspect", *prepared, "--steps=1", "sequence_length=32", "batch.sequences=4"]) == 0
    assert main(["evaluate", str(checkpoint), f"data.path={shards}"]) == 0
    assert main(["generate", str(checkpoint), "--prompt", "Ada", "--tokens", "2"]) == 0
    assert main(["export", str(checkpoint), str(tmp_path / "exported")]) == 0
    exported: Any = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "exported")
    tokenizer, texts = load_tokenizer(checkpoint / "tokenizer"), mixed_texts(20_000)
    assert exported(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts, threads=1)
    told = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (told["bos_token_id"], told["eos_token_id"]) == (tokenizer.begin_of_document, tokenizer.end_of_document)


def test_marks_of_any_writing_and_none_travel(tmp_path: Path) -> None:
    """The end of DeepSeek's documents, and no begin."""
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    folder = saved_tokenizer("gpt2", tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text(encoding="utf-8").replace("<|endoftext|>", end)
        (folder / name).write_text(text, encoding="utf-8")
    words = [*SMALL, "tokenizer=huggingface", f"tokenizer.path={folder}", f"data.cache={tmp_path / 'cache'}"]
    assert main(["prepare", str(tmp_path / "shards"), *words]) == 0
    found = composed("data=prepared", f"data.path={tmp_path / 'shards'}").tokenizer
    assert (found.end, found.begin) == (end, "")


def test_packed_documents_stand_between_begin_and_end(shards: Path, tmp_path: Path) -> None:
    """The batches are documents, each from begin to end, one after the other."""
    words = [*WORDS, "data=prepared", f"data.path={shards}", f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}"]
    session: Any = open_session(composed(*words, "sequence_length=1024"), torch.device("cpu"))
    tokenizer = session.data.tokenizer
    batch = session.data.train.batch(0)
    ids, targets = batch.ids_BS.reshape(-1).tolist(), batch.targets_BS.reshape(-1).tolist()
    after = [target for token, target in zip(ids, targets, strict=True) if token == tokenizer.end_of_document]
    assert after and set(after) == {tokenizer.begin_of_document}
    assert ids.count(tokenizer.begin_of_document) >= len(after) - 1
    session.data.train.close()


def test_another_tokenizer_than_that_of_the_data_is_refused_with_theirs(shards: Path, tmp_path: Path) -> None:
    words = [*WORDS, "data=prepared", f"data.path={shards}", "tokenizer=bytes", f"run.dir={tmp_path / 'run'}"]
    code = subprocess.run([sys.executable, "-m", "tokenyard", "train", *words], capture_output=True, text=True, timeout=120)
    assert code.returncode == 2 and code.stderr.count("\n") == 1
    expected = f"take its own: tokenizer.kind=huggingface tokenizer.path={shards / 'tokenizer' / 'tokenizer.json'} tokenizer.end="
    assert expected in code.stderr


def test_too_few_rows_are_refused_with_enough(theirs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, *SMALL, "tokenizer=huggingface", f"tokenizer.path={theirs}", "model.vocabulary=1000"]
    assert main(["train", *words, f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}"]) == 2
    rule = f"model.vocabulary=1000: is smaller than the tokenizer, which has {PIECES} pieces"
    assert f"{rule}; nearest valid: model.vocabulary={ROUNDED}" in capfd.readouterr().err


def test_nothing_of_this_imports_torch(shards: Path) -> None:
    code = f"""
import sys
from tokenyard.train.config.compose import parse_arguments
from tokenyard.train.weight_source import compose_run
print(compose_run(parse_arguments(["data=prepared", "data.path={shards}"]))[0].model.vocabulary, "torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(ROUNDED), "False"]
