"""Runs `tokenyard params`. Import it as `params_answers`: tests/conftest.py puts this folder on the path."""

import json

import pytest
from tokenyard.launch.main import main


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["params", *words, "--json"]) == 0
    out, error = capsys.readouterr()
    assert (out.count("\n"), error) == (1, "")
    return json.loads(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["params", *words]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error
