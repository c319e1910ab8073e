"""tokenizer.path: a file, a folder that holds one, or a model of the hub, here a server of this machine."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread

import pytest
from tokenizer_cases import saved_tokenizer
from tokenyard.data.config import TokenizerConfig, TokenizerKind
from tokenyard.data.tokenizer_path import tokenizer_file

ASK = """
import sys, time
from tokenyard.data.config import TokenizerConfig, TokenizerKind
from tokenyard.data.tokenizer import ready_tokenizer
begin = time.perf_counter()
try:
    found = ready_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=sys.argv[1]))
    print(found.hash, found.end)
except ValueError as error:
    print(error)
print(time.perf_counter() - begin)"""


def found(kind: str, path: Path | str) -> Path:
    return tokenizer_file(TokenizerConfig(kind=TokenizerKind[kind], path=str(path)))


def test_a_file_or_the_folder_that_holds_it(tmp_path: Path) -> None:
    for kind, name in (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / name).write_text("x")
        assert found(kind, folder) == found(kind, folder / name) == folder / name


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("sentencepiece", "huggingface", r"has no tokenizer\.model but a tokenizer\.json; the nearest is tokenizer=huggingface$"),
        ("huggingface", "sentencepiece", r"has no tokenizer\.json but a tokenizer\.model; the nearest is tokenizer=sentencepiece$"),
        ("huggingface", "sentencepiece/tokenizer.model", r"reads no .*; the nearest is tokenizer=sentencepiece$"),
        ("sentencepiece", "huggingface/tokenizer.json", r"reads no .*; the nearest is tokenizer=huggingface$"),
        ("huggingface", ".", r"must be a tokenizer\.json or a folder with a tokenizer\.json; it is a folder without$"),
        ("huggingface", "huggingfac", r"must exist; the nearest existing path is .*/huggingface$"),
        ("bytes", "huggingface", r"and not by tokenizer\.kind=bytes$"),
    ],
)
def test_what_is_none_is_refused_with_the_nearest(kind: str, path: str, expected: str, tmp_path: Path) -> None:
    test_a_file_or_the_folder_that_holds_it(tmp_path)
    with pytest.raises(ValueError, match=expected):
        found(kind, tmp_path / path)


@pytest.mark.parametrize("name", ["gpt2", "mistralai/Mixtral-8x7B-v0.1"])
def test_a_hub_that_cannot_be_reached_is_one_line_in_time(name: str, tmp_path: Path) -> None:
    """Offline by setting, a host without a name, and one that accepts the connection and says nothing."""
    with create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for settings, reason in (
            ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
            ({"HF_ENDPOINT": "http://no-such-host.invalid"}, ""),
            ({"HF_ENDPOINT": f"http://127.0.0.1:{port}"}, ""),
        ):
            text, seconds = ask(name, tmp_path, settings)
            assert text.startswith(f"tokenizer.path={name} is no path here, and the Hugging Face hub gives no tokenizer.json of")
            assert reason in text and "; the nearest existing path is " in text and "\n" not in text
            assert seconds < 2


def test_a_model_of_the_hub_is_downloaded_once(tmp_path: Path) -> None:
    theirs = saved_tokenizer("llama3", tmp_path / "theirs")
    with hub(theirs, "org/model") as (endpoint, requests):
        text, _ = ask("org/model", tmp_path, {"HF_ENDPOINT": endpoint})
        assert text == ask(str(theirs), tmp_path, {})[0] and text.endswith(" <|end_of_text|>")
        assert any(path.endswith("/tokenizer_config.json") for path in requests)
        assert "no tokenizer.json of that name" in ask("org/another", tmp_path, {"HF_ENDPOINT": endpoint})[0]
    assert ask("org/model", tmp_path, {"HF_HUB_OFFLINE": "1"})[0] == text


def ask(path: str, home: Path, settings: dict[str, str]) -> tuple[str, float]:
    """What a new process says of the tokenizer at `path`, and how many seconds that took after its imports."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {"HF_HOME": str(home / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", ASK, path],
        env=environment | settings,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    *text, seconds = done.stdout.splitlines()
    return "\n".join(text), float(seconds)


@contextmanager
def hub(folder: Path, model: str) -> Iterator[tuple[str, list[str]]]:
    """Serves the files of `folder` as those of a model of the hub. Yields its address, and the requests that come."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            _, _, name = self.path.rpartition("/")
            file = folder / name
            known = self.path.startswith((f"/{model}/resolve/main/", f"/{model}/resolve/{'a' * 40}/")) and file.is_file()
            content = file.read_bytes() if known else b"no such file"
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "EntryNotFound" if model in self.path else "RepoNotFound")
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()
