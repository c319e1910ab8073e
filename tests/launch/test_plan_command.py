"""`tokenyard plan --dry-run`: what it prints, and what it refuses in one line."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from dry_steps import printed
from tokenyard.launch.main import main

WORDS = "rank=1 world=4 model=tiny_qwen3_moe sequence_length=64 batch.sequences=4 parallel.expert=4"


def test_people_and_programs_get_the_same_numbers(apart: Callable[..., Any]) -> None:
    code, object_ = apart(printed, f"--json {WORDS}")
    again, text = apart(printed, WORDS)
    found = json.loads(object_)
    assert (code, again) == (0, 0)
    assert (found["rank"], found["world"], found["peak_bytes"]) == (1, 4, sum(found["peak"].values()))
    assert f"peak        {found['peak_bytes'] / 1e6:,.1f} MB in phase {found['peak_phase']}, layer {found['peak_layer']}" in text
    assert all(each["name"] in text for each in found["allowances"])
    assert {"alltoall", "allreduce"} == {each["kind"] for each in found["traffic"]}
    assert "2 x rows of each rank" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--dry-run rank=8 world=8 model=tiny parallel.expert=4", "rank=8: must be below world=8; nearest valid: rank=7"),
        ("--dry-run world=0 model=tiny", "world=0: must be a whole number from 1 on; nearest valid: world=1"),
        ("--dry-run layers=3 model=tiny", "layers=3: must be auto or all; nearest valid: layers=auto"),
        ("--dry-run hot=9 world=4 model=tiny parallel.expert=4", "hot=9: must be in (0, parallel.expert=4]; nearest valid: hot=4"),
        ("--dry-run hot=x model=tiny", "hot=x: must be in (0, parallel.expert=1]; nearest valid: hot=1"),
        ("--dry-run engine=deepspeed model=tiny", "engine.kind=deepspeed: DeepSpeed has no dry run; nearest valid: engine=torch"),
        ("--dry-run world=4 model=tiny parallel.tensor=3", "parallel.tensor=3: must divide model.heads=4; nearest valid: "),
    ],
)
def test_what_is_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"tokenyard: {says}")
