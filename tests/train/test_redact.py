"""Secrets are replaced, by value and by name, and nothing else is."""

import logging
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from tokenyard.data.errors import DataUnavailable
from tokenyard.launch.main import main
from tokenyard.train import exit as stop
from tokenyard.train.config.compose import compose
from tokenyard.train.config.redact import RedactingFormatter, redact, redact_plain
from tokenyard.train.config.serialize import shown_config, write_config
from tokenyard.train.exit import NOTE, STACKS, Failure, find_note, leave_note
from tokenyard.train.fault_tolerance.hang_diagnosis import HangDiagnosis, Position
from tokenyard.train.fault_tolerance.recovery import recover
from tokenyard.train.fault_tolerance.step_guard import Action, Fault
from tokenyard.train.fault_tolerance.watchdog import Watchdog
from tokenyard.train.logging.journal import Journal, read_journal

SECRET = "s3cr3t-value-of-it"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("PLAIN_VALUE", "not-a-secret")


def test_values_and_names() -> None:
    assert redact(f"https://u:{SECRET}@host not-a-secret") == "https://<user>@host not-a-secret"
    assert redact(f"no{SECRET}, abc") == "no<SOME_API_KEY>, <SHORT_TOKEN>"
    plain = {"api_key": "x", "tokens": "many", "seed": 1, "deep": [{"hub-token": "y", "text": SECRET}]}
    assert redact_plain(plain) == {
        "api_key": "<api_key>",
        "tokens": "many",
        "seed": 1,
        "deep": [{"hub-token": "<hub-token>", "text": "<SOME_API_KEY>"}],
    }


@pytest.mark.parametrize("value", ["/a-secret-that-is-no-file", "1234567890", "hunter2", "abc", "s3cr3t.value+of[it"])
def test_values_of_any_kind(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", value)
    assert value not in redact(f"no {value}, {value}: '{value}' at https://host/{value}/x")
    assert redact_plain({value: 1, "deep": [f"as {value}"]}) == {"<SOME_PASSWORD>": 1, "deep": ["as <SOME_PASSWORD>"]}


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (("A_TOKEN", "1"), ("B_TOKEN", "123"), ("C_KEY", "on"), ("D_CREDENTIALS", str(tmp_path))):
        monkeypatch.setenv(name, value)
    text = f"step 1 loss 0.123 and 123.5 at 1234, abcs, on, {tmp_path}"
    assert redact(text) == text and redact_plain({"step": 123, "loss": 0.123}) == {"step": 123, "loss": 0.123}


def test_urls() -> None:
    text = "https://me:pass@host/a?token=xyz&part=2&X-Amz-Signature=q1 and git+ssh://u:p@h:22/x?api_key=1, http://host:80/a@b"
    cleaned = "https://<user>@host/a?token=<secret>&part=2&X-Amz-Signature=<secret> and git+ssh://<user>@h:22/x?api_key=<secret>"
    assert redact(text) == f"{cleaned} http://host:80/a@b" or redact(text) == f"{cleaned}, http://host:80/a@b"


@pytest.mark.parametrize(
    "code", ["raise OSError('no ' + KEY)", "import threading; threading.Thread(target=lambda: 1 / int(KEY)).start()"]
)
def test_tracebacks(code: str) -> None:
    start = "import os; from tokenyard.train.config import redact; redact.redact_tracebacks(); KEY = os.environ['SOME_API_KEY']; "
    said = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, timeout=60).stderr
    assert SECRET not in said and "<SOME_API_KEY>" in said and "Traceback" in said


def test_what_ends_a_run_is_said_without_secrets(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """In every message: an error about a URL that does not answer shows the URL, which may hold a key."""
    url = f"https://me:{SECRET}@host/a?token=xyz"
    stop.report_stop(DataUnavailable(f"{url} did not answer for 3 s (OSError: {SECRET})"), 7)
    with mock.patch.object(stop.dist, "is_initialized", lambda: True), mock.patch.object(stop, "place", lambda: "rank 0"):
        stop.report_failure(OSError(f"no {url}"))
    dog = Watchdog(tmp_path, 0, 2, 1.0)
    dog._print(HangDiagnosis([1], f"hang: rank 1 at {url}"))
    (tmp_path / STACKS).write_text("in the way")
    dog._write_note(Position(0, 1, url, None, None, 0, 0.0, ""))
    supervisor = mock.Mock(bad_data=f"OSError: {url}", **{"guard.fault.return_value": Fault("bad_data", "rows", Action.stop)})
    with pytest.raises(stop.RunStop):
        recover(mock.Mock(step=3), supervisor, mock.Mock())
    assert main(["data", "verify", f"/no/such/{SECRET}"]) == 2
    assert main(["data", "inspect", f"data.path={url}", "data=jsonl", "data.colour=1"]) == 2
    with pytest.raises(SystemExit):
        main(["generate", "x", "--prompt", "x", "--tokens", SECRET])
    said = capsys.readouterr().err
    assert SECRET not in said and "xyz" not in said and said.count("\n") == said.count("tokenyard: ") == 8


def test_a_rank_that_fails_alone_leaves_no_secret(tmp_path: Path) -> None:
    leave_note(tmp_path, Failure(1, 3, f"OSError: no {SECRET}", 1))
    assert SECRET not in (tmp_path / NOTE).read_text()
    assert find_note(tmp_path) == Failure(1, 3, "OSError: no <SOME_API_KEY>", 1)


def test_a_configuration_that_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "job", f"run.name={SECRET}"]) == 0
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err and "<SOME_API_KEY>" in said.out


def test_files_and_logs(tmp_path: Path) -> None:
    config = compose([f"run.name={SECRET}"])
    write_config(config, tmp_path / "config.yaml")
    journal = Journal(tmp_path / "events.jsonl")
    journal.event("failed", error=f"no {SECRET}")
    journal.close()
    assert SECRET not in (tmp_path / "config.yaml").read_text() + (tmp_path / "events.jsonl").read_text()
    assert read_journal(tmp_path / "events.jsonl")[0]["error"] == "no <SOME_API_KEY>"
    record = logging.LogRecord("tokenyard", logging.WARNING, "", 0, "no %s", (SECRET,), None)
    assert RedactingFormatter("%(message)s").format(record) == "no <SOME_API_KEY>"
    assert config.run.name == SECRET and shown_config(compose([])) == shown_config(compose([]))
