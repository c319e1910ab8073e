"""What a journal holds after writes, kills, torn lines and resumes."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenyard.train.logging.journal import Journal, read_journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write(path: Path, steps: range, **fields: float) -> None:
    journal = Journal(path)
    for step in steps:
        journal.write({"step": step, **fields})
    journal.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path)]


def test_one_object_a_line_with_all_digits(path: Path):
    write(path, range(1, 3), loss=0.1 + 0.2, lr=5e-324)
    assert path.read_text() == (
        '{"step": 1, "loss": 0.30000000000000004, "lr": 5e-324}\n{"step": 2, "loss": 0.30000000000000004, "lr": 5e-324}\n'
    )


def test_not_finite_numbers_are_valid_json_and_come_back(path: Path):
    journal = Journal(path)
    journal.write({"step": 1, "loss": math.nan, "moe": {"load": [1.0, math.inf, -math.inf]}, "name": "NaNny"})
    journal.close()
    strict = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"step": 1, "loss": "NaN", "moe": {"load": [1.0, "Infinity", "-Infinity"]}, "name": "NaNny"}
    (record,) = read_journal(path)
    assert math.isnan(record["loss"])
    assert record["moe"]["load"] == [1.0, math.inf, -math.inf]
    assert record["name"] == "NaNny"


def test_tensors_become_lists(path: Path):
    journal = Journal(path)
    journal.write({"counts": torch.tensor([[1, 2**53 + 1]]), "loss": torch.tensor(0.5), "bad": torch.tensor([math.nan])})
    journal.close()
    assert json.loads(path.read_text()) == {"counts": [[1, 2**53 + 1]], "loss": 0.5, "bad": ["NaN"]}


@pytest.mark.fault(29)
@pytest.mark.parametrize("shape", [(3,), (4, 5), (2, 3, 4)])
def test_a_tensor_of_floats_has_six_digits_and_a_list_all(path: Path, shape: tuple[int, ...]):
    """Read back they are the floats that are nearest to these digits; other keys, text and numbers stay as they are."""
    x = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-12, 12, shape)
    ints = torch.randint(-(10**9), 10**9, shape)
    journal = Journal(path)
    journal.write({"a": x, "within": {"3": x, "text": '"[%d] 0'}, "ints": ints, "list": x.tolist(), "none": torch.zeros(0, 2)})
    journal.write({"bad": x.masked_fill(x == x.max(), math.nan), "flags": x > 0, "one": x.flatten()[0]})
    journal.close()
    found, second = read_journal(path)
    assert torch.tensor(found["a"], dtype=torch.float64).tolist() == x.clone().apply_(lambda each: float(f"{each:.6g}")).tolist()
    assert found["within"] == {"3": found["a"], "text": '"[%d] 0'}
    assert found["ints"] == ints.tolist() and found["list"] == x.tolist() and found["none"] == []
    assert second["flags"] == (x > 0).tolist() and second["one"] == x.flatten()[0].item()
    assert torch.tensor(second["bad"]).isnan().sum() == 1


def test_resume_cuts_back_and_no_step_stands_twice(path: Path):
    write(path, range(1, 11))
    resumed = Journal(path, keep_to_step=6)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    for step in (7, 8):
        resumed.write({"step": step, "again": True})
    resumed.close()
    assert steps(path) == list(range(1, 9))
    assert list(path.parent.iterdir()) == [path]


def test_a_new_start_empties_the_file(path: Path):
    write(path, range(1, 4))
    Journal(path, keep_to_step=0).close()
    assert path.read_bytes() == b""


def test_appending_keeps_all(path: Path):
    write(path, range(1, 4))
    write(path, range(4, 6))
    assert steps(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b"{", b'{"step": 4, "name": "\xc3', b"\x00\x00\x00", b"4\n", b"\x00\x00\n"])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes):
    write(path, range(1, 4))
    with path.open("ab") as file:
        file.write(torn)
    assert steps(path) == [1, 2, 3]
    write(path, range(4, 5))
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))


def test_a_last_line_that_lacks_only_its_newline_is_kept(path: Path):
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, range(4, 5))
    assert steps(path) == [1, 2, 3, 4]


def test_damage_in_the_middle_is_named_and_set_aside(path: Path):
    write(path, range(1, 4))
    path.write_text(path.read_text().replace('{"step": 2}', '{"step": 2'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON object") as error:
        read_journal(path)
    assert "\n" not in str(error.value)
    Journal(path, keep_to_step=3).close()
    assert steps(path) == [1, 3]
    [aside] = path.parent.glob("metrics.jsonl.damaged-*")
    assert '{"step": 2\n' in aside.read_text()


def test_only_the_last_line_may_be_torn(path: Path):
    write(path, range(1, 3))
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo\n{"step": 4')
    with pytest.raises(ValueError, match="line 3"):
        read_journal(path)


def test_a_crash_while_cutting_back_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch):
    write(path, range(1, 4))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        Journal(path, keep_to_step=1)
    assert steps(path) == [1, 2, 3]


def test_a_killed_process_loses_nothing_that_was_written(path: Path):
    code = (
        "import os, signal; from tokenyard.train.logging.journal import Journal\n"
        f"journal = Journal({str(path)!r})\n"
        "for step in range(1, 101): journal.write({'step': step, 'text': 'x' * (20_000 if step % 2 else 20)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": _root()}).returncode
        == -signal.SIGKILL
    )
    assert steps(path) == list(range(1, 101))


def test_events_have_a_time_and_their_facts(path: Path):
    journal = Journal(path)
    journal.event("resume", step=7, checkpoint="step_00000007")
    journal.close()
    (record,) = read_journal(path)
    assert record.pop("time").endswith("+00:00")
    assert record == {"event": "resume", "step": 7, "checkpoint": "step_00000007"}


def _root() -> str:
    """The folder that holds the package under test."""
    import tokenyard

    return str(Path(tokenyard.__file__).parents[1])
