"""Nothing that a user opens can run code, lead outside, or carry a secret of the environment into a run's folder."""

import io
import json
import pickle
import shutil
from pathlib import Path

import pytest
import xxhash
from checkpoint_run import configured, words
from forked_runs import ending, free_port, start, wait
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.checkpoint.store import read_whole
from tokenyard.train.load import load_model
from tokenyard.train.rank_command import run_rank
from tokenyard.train.run import run

SECRET = "hunter2-5f3c9a-never-written"


class Touch:
    """As a pickle, makes the file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.path,))


def restated(path: Path, change) -> None:
    """The manifest changed, with a hash that fits: a hash is no signature."""
    content = json.loads((path / "manifest.json").read_text())
    change(content)
    del content["hash"]
    content["hash"] = xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps(content))


def replace_by_pickle(path: Path, sentinel: Path) -> None:
    buffer = io.BytesIO()
    pickle.dump(Touch(sentinel), buffer)
    shard = path / "shard_00000.safetensors"
    shard.write_bytes(buffer.getvalue())
    record = {"bytes": len(buffer.getvalue()), "hash": xxhash.xxh3_128_hexdigest(buffer.getvalue())}
    restated(path, lambda content: content["files"].update({shard.name: record}) or content["tensors"].clear())


def lead_outside(path: Path, sentinel: Path) -> None:
    def change(content):
        content["attachments"]["../../x"] = {"bytes": 1, "hash": "0"}

    restated(path, change)


def lie_about_sizes(path: Path, sentinel: Path) -> None:
    """A tensor of 4 TB in a file of some kB."""

    def change(content):
        group = next(one for one in content["tensors"] if one["names"][0].startswith("model."))
        group["shape"] = [1 << 40] + [1] * (len(group["shape"]) - 1)
        group["cuts"] = [[0, size] for size in group["shape"]]

    restated(path, change)


def name_a_target(path: Path, sentinel: Path) -> None:
    def change(content):
        content["facts"]["config"]["model"]["_target_"] = "os.system"

    restated(path, change)


def name_a_target_where_keys_are_free(path: Path, sentinel: Path) -> None:
    def change(content):
        content["facts"]["config"]["engine"]["extra"] = {"_target_": "logging.os.system", "command": f"touch {sentinel}"}

    restated(path, change)


HOSTILE = {
    replace_by_pickle: r"holds 0 tensors|no tensor's name begins with|no readable safetensors",
    lead_outside: r"'\.\./x' must be a plain name|'\.\.' must be a plain name",
    lie_about_sizes: "is said to hold",
    name_a_target: "_target_",
    name_a_target_where_keys_are_free: "_target_",
}


@pytest.mark.fault(30)
@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
def test_a_hostile_checkpoint(tmp_path: Path, attack, record_property) -> None:
    assert run(configured(tmp_path / "run", "steps=1")) == 0
    [path] = (tmp_path / "run" / "checkpoints").iterdir()
    attack(path, tmp_path / "sentinel")
    with pytest.raises(ValueError, match=HOSTILE[attack]) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert run(configured(tmp_path / "run", "steps=2")) == 2
    assert not (tmp_path / "sentinel").exists()
    record_property("measured", f"{attack.__name__}: refused by name, nothing ran")


@pytest.mark.fault(30)
@pytest.mark.parametrize("word", ["+model._target_=os.system", "+_target_=logging.os.system", "+engine.extra._target_=os.system"])
def test_a_hostile_configuration(tmp_path: Path, word: str, capsys) -> None:
    assert run_rank(words(tmp_path / "run", word)) == 2
    assert "_target_" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.fault(30)
def test_a_secret_is_in_no_file_and_nobody_listens(tmp_path: Path, record_property) -> None:
    folder = tmp_path / "run"
    hidden = [f"run.name='name {SECRET}'", f"tracker.project='project {SECRET}'", "tracker.names=[wandb]"]
    port = free_port()
    environment = {"MY_SERVICE_TOKEN": SECRET, "WANDB_MODE": "offline", "WANDB_DIR": "", "MASTER_PORT": str(port)}
    started = start(
        2, words(folder, "steps=4", "checkpoint.every=1", *hidden, "parallel.expert=2"), tmp_path / "log", **environment
    )
    listeners: set[str] = set()
    with ending(started):
        while any(process.is_alive() for process in started):
            listeners |= {line for process in started for line in listening_everywhere(process.pid or 0, port)}
            for process in started:
                process.join(0.2)
        wait(started, 60, tmp_path / "log")
    assert [process.exitcode for process in started] == [0, 0], (tmp_path / "log").read_text()
    files = [path for path in [*folder.rglob("*"), tmp_path / "log"] if path.is_file()]
    hits = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert hits == [] and any(path.suffix == ".wandb" for path in files)
    assert b"<MY_SERVICE_TOKEN>" in (folder / "config.yaml").read_bytes()
    assert listeners == set()
    record_property("measured", f"0 hits for the secret in {len(files)} files, wandb's too; no listener of ours on 0.0.0.0")


def listening_everywhere(pid: int, store: int) -> set[str]:
    """Sockets of the process that listen on all interfaces; torch's store, which does, is at the port `store`."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").glob("*") if pid else []:
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, number = fields[1].partition(":")
            if fields[3] == "0A" and set(address) == {"0"} and fields[9] in inodes and int(number, 16) != store:
                found.add(line)
    return found


@pytest.mark.fault(30)
def test_the_tensors_of_a_good_one_are_still_read(tmp_path: Path) -> None:
    assert run(configured(tmp_path / "run", "steps=1")) == 0
    [path] = (tmp_path / "run" / "checkpoints").iterdir()
    shutil.copytree(path, tmp_path / "copy")
    assert read_manifest(tmp_path / "copy").step == 1 and read_whole(tmp_path / "copy")
