"""Malicious Hugging Face folders end in exit code 2 and one line, before anything of their size is allocated."""

import json
import os
from pathlib import Path

import pytest
import tiny_files
from tokenyard.interop import hf_folder as folder
from tokenyard.interop.load_weights import open_source
from tokenyard.launch.main import main
from tokenyard.train.stored_config import LARGEST_TOKENIZER

HUGGING_FACE = {
    "layers of 10^9": lambda about: about.update(num_hidden_layers=10**9),
    "experts of 10^12": lambda about: about.update(num_local_experts=10**12),
    "a number of 400 digits": lambda about: about.update(rms_norm_eps=10**400),
    "NaN": lambda about: about.update(rms_norm_eps=float("nan")),
    "a list": lambda about: about.update(vocab_size=[1] * 100_000),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_hugging_face_folder_that_is_none(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_files.tiny_hugging_face(tmp_path)
    about = json.loads((path / "config.json").read_text())
    HUGGING_FACE[name](about)
    (path / "config.json").write_text(json.dumps(about))
    for words in (["import", str(path), str(tmp_path / "out")], ["params", str(path)]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and len(said.err) < 1200


def test_pipes_in_a_hugging_face_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_files.tiny_hugging_face(tmp_path)
    for name in ("config.json", "model-1.safetensors"):
        kept = (path / name).read_bytes()
        (path / name).unlink()
        os.mkfifo(path / name)
        assert main(["import", str(path), str(tmp_path / "out")]) == 2 and capsys.readouterr().err.count("\n") == 1
        (path / name).unlink()
        (path / name).write_bytes(kept)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "chat_template.jinja"])
def test_a_tokenizer_of_a_size_that_none_has(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse file, which takes no space."""
    path = tiny_files.tiny_hugging_face(tmp_path)
    with (path / name).open("wb") as file:
        file.truncate(LARGEST_TOKENIZER + 1)
    assert main(["import", str(path), str(tmp_path / "out")]) == 2
    assert f"{name} has {LARGEST_TOKENIZER + 1} bytes, more than" in capsys.readouterr().err and not (tmp_path / "out").exists()


def with_header(text: bytes, length: int = 0) -> bytes:
    return (length or len(text)).to_bytes(8, "little") + text


def test_each_rule_of_a_hugging_face_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_files.tiny_hugging_face(tmp_path)
    weights, config = (path / "model-1.safetensors").read_bytes(), (path / "config.json").read_text()
    deep_one = json.dumps({"x": {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]}}).encode()
    long_name = json.dumps({"x" * 9999: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    for file, content, reason in (
        ("model-1.safetensors", with_header(b"{}", 1 << 40), r"has a header of 1099511627776 bytes in 10"),
        ("model-1.safetensors", with_header(json.dumps({"x": "x" * 9999}).encode()), r"file: .{100,400}$"),
        ("model-1.safetensors", with_header(deep_one.replace(b"F32", b"a\\nb")), r"^[^\n]*unknown variant `a b`"),
        ("model-1.safetensors", with_header(deep_one) + bytes(4), "tensor 'x' has more than 16 dimensions"),
        ("model-1.safetensors", with_header(long_name) + bytes(4), r"^'x{59}\.\.\. must be a name of at most"),
        ("config.json", config.replace('_layers": 1', '_layers": 1000').encode(), "describes 1000 layers and more weights than"),
        ("config.json", config.encode() + b" " * (1 << 20), "more than the 1048576 that are read"),
        ("config.json", config[:-1].encode() + b', "vocab_size": 264}', "the key 'vocab_size' stands there twice"),
    ):
        (path / file).write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            open_source(path)
        (path / "model-1.safetensors").write_bytes(weights)
        (path / "config.json").write_text(config)
    monkeypatch.setattr(folder, "MOST_TENSORS", 3)
    with pytest.raises(ValueError, match=r"weight_map names \d+ tensors, more than 3"):
        open_source(path)
