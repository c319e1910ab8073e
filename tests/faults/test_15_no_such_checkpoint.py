"""A checkpoint.resume that is missing, empty, of another model or of a newer format is refused before torch is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash
from checkpoint_run import configured, words
from tokenyard.train.run import run

PROGRAM = """
import json, sys, time
from tokenyard.train.rank_command import run_rank
for line in json.load(sys.stdin):
    begin = time.perf_counter()
    code = run_rank(line)
    print(code, time.perf_counter() - begin, "torch" in sys.modules, flush=True)
"""


@pytest.mark.fault(15)
def test_six_targets(tmp_path: Path, record_property) -> None:
    assert run(configured(tmp_path / "run")) == 0
    good = tmp_path / "run" / "checkpoints" / "step_00000006"
    (tmp_path / "empty").mkdir()
    newer = shutil.copytree(good, tmp_path / "newer" / good.name)
    restate(newer, version=99)
    cut = shutil.copytree(good, tmp_path / "cut" / good.name)
    (cut / "shard_00000.safetensors").write_bytes(b"")
    bare = tmp_path / "bare" / "checkpoints" / good.name
    bare.mkdir(parents=True)
    targets = {
        "missing": ([f"checkpoint.resume={tmp_path / 'nowhere'}"], "must be auto, never or the path of a checkpoint"),
        "empty": ([f"checkpoint.resume={tmp_path / 'empty'}"], "is neither a checkpoint nor a run folder with one"),
        "no manifest": ([f"checkpoint.resume={bare}"], "has no manifest.json"),
        "another model": ([f"checkpoint.resume={good}", "model.moe.top_k=1"], "model.moe.top_k=1: the checkpoint"),
        "newer format": ([f"checkpoint.resume={newer}"], "version = 99 cannot be read: it must be 2 or 1"),
        "cut off": ([f"checkpoint.resume={cut}"], "shard_00000.safetensors is damaged: it has 0 bytes"),
        "another model in the run's own folder": (
            [f"run.dir={tmp_path / 'run'}", "model.width=64"],
            "model.width=64: the checkpoint",
        ),
    }
    lines = [words(tmp_path / f"new_{index}", *overrides) for index, (overrides, _) in enumerate(targets.values())]
    settings = {"input": json.dumps(lines), "env": {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": "/usr/bin:/bin"}}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], **settings, capture_output=True, text=True, timeout=60, check=False)
    answers, errors = [line.split() for line in ended.stdout.splitlines()], ended.stderr.splitlines()
    assert len(answers) == len(errors) == len(targets), ended.stderr
    for (name, (_, rule)), (code, seconds, torch_is_there), error in zip(targets.items(), answers, errors, strict=True):
        assert code == "2" and rule in error, (name, error)
        assert float(seconds) < 3 and torch_is_there == "False", name
    assert not list(tmp_path.glob("new_*"))
    slowest = max(float(seconds) for _, seconds, _ in answers)
    record_property(
        "measured", f"{len(targets)}/{len(targets)} refused with exit 2 before torch is imported, the slowest after {slowest:.1f} s"
    )


@pytest.mark.fault(15)
def test_a_folder_whose_only_checkpoint_is_damaged_is_not_begun_anew(tmp_path: Path, capsys) -> None:
    assert run(configured(tmp_path / "run", "checkpoint.every=0")) == 0
    [path] = (tmp_path / "run" / "checkpoints").iterdir()
    (path / "manifest.json").unlink()
    capsys.readouterr()
    assert run(configured(tmp_path / "run", "checkpoint.every=0")) == 2
    assert "checkpoint.resume=auto" in capsys.readouterr().err
    assert [entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000006"]


def restate(path: Path, **changes: object) -> None:
    """Edit the manifest, with a hash that fits."""
    content = json.loads((path / "manifest.json").read_text()) | changes
    del content["hash"]
    content["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(content))
