"""Fault 48: ranks are killed and the disks of hosts are lost; the run goes on from the newest step that all ranks can read.

Four ranks on one machine stand for hosts: each is told the name of its own. A host is lost when its folder is removed.
"""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_run import everything, losses, same_tensors, words
from fault_run import events_of
from forked_runs import Ended, ending, start_each, wait
from tokenyard.checkpoint.hosts import Hosts
from tokenyard.checkpoint.local_files import parts_in
from tokenyard.checkpoint.local_restore import newest_whole

STEPS, DURABLE, WHOLE, NEWEST = 14, 7, 9, 12
RUN = [f"steps={STEPS}", f"checkpoint.every={DURABLE}", "parallel.expert=2", "parallel.shard=2"]
LOCAL = ["checkpoint.local.every=3"]
KILLED = "local.begun:rank=2:step=6:enospc,step.begin:rank=1:step=14:SIGKILL"
"""The disk of one host is full in a save on the way."""


def placed(folder: Path, hosts: str, *overrides: str, failpoints: str = "") -> Ended:
    """The run with one rank for each letter of `hosts`, which is the name of its host."""
    line, log = words(folder, *RUN, *overrides), folder.parent / "log"
    started = start_each(len(hosts), line, log, [{"TOKENYARD_HOST": host, "TOKENYARD_FAILPOINTS": failpoints} for host in hosts])
    with ending(started):
        wait(started, 90.0, log)
    return Ended([process.exitcode or 0 for process in started], log.read_text(errors="replace"))


def tier(folder: Path) -> list[str]:
    return [*LOCAL, f"checkpoint.local.folder={folder.parent / 'hosts'}"]


def host_folder(folder: Path, host: str) -> Path:
    (found,) = (folder.parent / "hosts").glob(f"*/{host}")
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody kills, without a local tier."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    ended = placed(folder, "abcd")
    assert ended.codes == [0] * 4, ended.output
    return folder


Killed = Callable[[str], Path]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """`killed("aabb")`: a run on these hosts whose rank 1 was killed at the begin of step 14; each time as it was then."""
    base = tmp_path_factory.mktemp("killed")

    def folder(hosts: str) -> Path:
        work, kept = base / hosts / "work", base / hosts / "kept"
        if not kept.exists():
            ended = placed(work / "run", hosts, *tier(work / "run"), failpoints=KILLED)
            assert ended.codes[1] == -signal.SIGKILL, ended.output
            shutil.copytree(work, kept)
        shutil.rmtree(work)
        shutil.copytree(kept, work)
        return work / "run"

    return folder


def goes_on(folder: Path, hosts: str, step: int, straight: Path) -> None:
    """The same command again resumes after `step`, and the whole run is bit for bit the one that nobody killed."""
    ended = placed(folder, hosts, *tier(folder))
    assert ended.codes == [0] * 4, ended.output
    assert [event["step"] for event in events_of(folder, "resume")] == [step]
    assert [event["step"] for event in events_of(folder, "resume_local")] == ([] if step == DURABLE else [step])
    assert losses(folder) == losses(straight)
    ours, theirs = (everything(each / "checkpoints" / f"step_{STEPS:08d}") for each in (folder, straight))
    assert same_tensors(ours, theirs)
    assert not list((folder.parent / "hosts").glob("*")), "a run that has ended leaves nothing on its hosts"


LOST = {
    ("aabb", "b"): NEWEST,
    ("abcd", "bd"): NEWEST,
    ("abcd", "bc"): DURABLE,
}
"""By hosts of the ranks and hosts that were lost: the step from which the run goes on. Of b and c, c had the copy of b."""


@pytest.mark.fault(48, "2 hosts of 2 ranks, 4 of 1: own files, the next host's copy, or the durable step; bitwise the straight run")
@pytest.mark.parametrize(("hosts", "lost"), LOST)
def test_lost_disks(hosts: str, lost: str, killed: Killed, straight: Path) -> None:
    folder = killed(hosts)
    for host in lost:
        shutil.rmtree(host_folder(folder, host))
    goes_on(folder, hosts, LOST[hosts, lost], straight)


@pytest.mark.fault(48, "killed in a local save, at each of its phases: never taken, the one before is")
@pytest.mark.parametrize("point", ["begun", "copied"])
def test_half_a_save_is_never_taken(point: str, tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "run"
    ended = placed(folder, "aabb", *tier(folder), failpoints=f"local.{point}:rank=1:step={NEWEST}:SIGKILL")
    assert ended.codes[1] == -signal.SIGKILL, ended.output
    shutil.rmtree(host_folder(folder, "b"))
    goes_on(folder, "aabb", WHOLE, straight)


@pytest.mark.fault(48, "a flipped bit in a part and in its copy: both refused by name, the step before is taken")
def test_a_damaged_part(killed: Killed, straight: Path) -> None:
    folder = killed("aabb")
    for host in "ab":
        (path,) = host_folder(folder, host).glob(f"step_{NEWEST:08d}/rank_00001_of_*.safetensors")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    goes_on(folder, "aabb", WHOLE, straight)


@pytest.mark.fault(48, "a full disk of a host: told, the run goes on, and so does the next save")
def test_a_full_disk(killed: Killed) -> None:
    folder = killed("aabb")
    (failed,) = events_of(folder, "local_failed")
    assert failed["step"] == 6 and failed["error"].startswith("rank 2: OSError")
    assert {step for step, _, _ in parts_in(host_folder(folder, "a"))} == {WHOLE, NEWEST}


@pytest.mark.fault(48, "a run that goes back by checkpoint.resume=PATH: what it had saved later on hosts is not taken")
def test_another_timeline(killed: Killed) -> None:
    folder = killed("aabb")
    source = folder / "checkpoints" / f"step_{DURABLE:08d}"
    again = placed(folder, "aabb", *tier(folder), f"checkpoint.resume={source}", failpoints="step.begin:rank=1:step=9:SIGKILL")
    assert again.codes[1] == -signal.SIGKILL, again.output
    assert len(list((folder.parent / "hosts").glob("*"))) == 1 and not parts_in(host_folder(folder, "a"))
    ended = placed(folder, "aabb", *tier(folder))
    assert ended.codes == [0] * 4, ended.output
    assert [event["step"] for event in events_of(folder, "resume")] == [DURABLE, DURABLE]


def test_a_folder_that_is_no_host_s(tmp_path: Path) -> None:
    """Each in one line, with exit code 2."""
    (tmp_path / "file").touch()
    inside, file = tmp_path / "run" / "local", tmp_path / "file"
    for setting, rule in ((inside, "must be each host's own"), (file, "cannot be written on a")):
        ended = placed(tmp_path / "run", "a", f"checkpoint.local.folder={setting}", "parallel.expert=1", "parallel.shard=1")
        assert ended.codes == [2] and f"checkpoint.local.folder={setting}: {rule}" in ended.output, ended.output
        assert ended.output.count("\n") == 1 and "nearest valid: checkpoint.local.folder=" in ended.output


def test_one_host_says_that_it_has_no_copies(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = placed(folder, "aa", *tier(folder), "steps=4")
    assert ended.codes == [0, 0]
    assert ended.output.count("no copies on other hosts, because all ranks are on one host, a, which has no neighbour") == 1


def test_which_part_comes_from_where() -> None:
    """From the rank itself if its host has it, else from the host with the copy, whose ranks take turns."""
    hosts = Hosts(0, list("aabbcc"))
    own = [{(3, 6, rank) for rank in (host * 2, host * 2 + 1)} for host in range(3)]
    held = [own[0] | own[2], set(), own[1] | own[0], set(), own[2] | own[1], set()]
    assert newest_whole(held, hosts) == (3, [0, 1, 2, 3, 4, 5])
    assert newest_whole([held[0], set(), set(), set(), held[4], set()], hosts) == (3, [0, 1, 4, 5, 4, 5])
    assert newest_whole([held[0], *[set()] * 5], hosts) is None
    newer = [{*held[0], (6, 6, 0)}, *held[1:]]
    assert newest_whole(newer, hosts) == (3, [0, 1, 2, 3, 4, 5])
    fewer: list[Any] = [{(3, 6, rank) for rank in range(6)}, set()]
    assert newest_whole(fewer, Hosts(0, list("ab"))) == (3, [0] * 6)
