"""The exit codes of the code are those of docs/running.md."""

import re
from pathlib import Path

from tokenyard.data.errors import BadData, DataUnavailable
from tokenyard.train.config.complain import BAD_USAGE
from tokenyard.train.exit import ExitCode

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "running.md").read_text()


def test_the_document_lists_each() -> None:
    assert [int(code) for code in re.findall(r"^\| (\d+) \| ", TEXT, re.M)] == [int(code) for code in ExitCode]


def test_each_is_used_under_one_number() -> None:
    assert (BadData.exit_code, DataUnavailable.exit_code) == (ExitCode.bad_data, ExitCode.data_unavailable)
    assert ExitCode.bad_configuration == BAD_USAGE
