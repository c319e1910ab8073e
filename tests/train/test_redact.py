"""Secrets are replaced by value and by name, and nothing else is."""

import logging
from pathlib import Path

import pytest
from tokenyard.train.compose import compose
from tokenyard.train.journal import Journal, read_journal
from tokenyard.train.plain import shown_config, write_config
from tokenyard.train.redact import RedactingFormatter, redact, redact_plain

SECRET = "s3cr3t-value-of-it"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    monkeypatch.setenv("PLAIN_VALUE", "not-a-secret")


def test_values_and_names() -> None:
    assert redact(f"https://u:{SECRET}@host abc not-a-secret") == "https://u:<SOME_API_KEY>@host abc not-a-secret"
    plain = {"api_key": "x", "tokens": "many", "seed": 1, "deep": [{"hub-token": "y", "text": SECRET}]}
    assert redact_plain(plain) == {
        "api_key": "<api_key>",
        "tokens": "many",
        "seed": 1,
        "deep": [{"hub-token": "<hub-token>", "text": "<SOME_API_KEY>"}],
    }


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
