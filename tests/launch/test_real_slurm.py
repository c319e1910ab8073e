"""`sbatch --test-only` of the rendered script by a real Slurm, started here: two hosts of 64 cores and 8 GPUs on one machine."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenyard.launch.launchers.slurm import batch_script
from tokenyard.train.config.compose import compose, parse_arguments

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
JOB = ["launch=slurm", "launch.nodes=2", "launch.ranks=8", "parallel.expert=8", "batch.sequences=128", "run.dir=runs/first"]

CONFIGURATION = """\
ClusterName=tokenyard
SlurmctldHost={machine}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName=host0 NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=1000 Gres=gpu:8
NodeName=host1 NodeHostname={machine} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=1000 Gres=gpu:8
PartitionName=main Nodes=host0,host1 Default=YES MaxTime=2-0 State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds the cluster."""
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm here: needs root and {', '.join(missing or DAEMONS)} (apt-get install slurmctld slurmd munge)")
    folder = tmp_path_factory.mktemp("slurm")
    machine, ports = socket.gethostname().partition(".")[0], free_ports(3)
    (folder / "slurm.conf").write_text(CONFIGURATION.format(machine=machine, ports=ports, folder=folder))
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    try:
        start_daemons(folder, environment)
        yield environment
    finally:
        for file in folder.glob("*.pid"):
            subprocess.run(["kill", file.read_text().strip()], capture_output=True, check=False)


def test_a_real_slurm_would_take_the_job(slurm: dict[str, str], tmp_path: Path) -> None:
    done = ask(slurm, tmp_path, JOB)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr and "using 64 processors on nodes host[0-1] in partition main" in done.stderr


@pytest.mark.parametrize(
    "word",
    [
        "launch.slurm.partition=other",
        "launch.nodes=3",
        "launch.cores=9",
        "launch.gpus=9",
        "launch.slurm.lines=['--constraint=h100']",
    ],
)
def test_it_reads_each_option(word: str, slurm: dict[str, str], tmp_path: Path) -> None:
    """The cluster refuses resources that it does not have, so the options of the script reach it."""
    done = ask(slurm, tmp_path, [*(other for other in JOB if other.partition("=")[0] != word.partition("=")[0]), word])
    assert done.returncode != 0


def ask(environment: dict[str, str], folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    script = folder / "job.sh"
    script.write_text(batch_script(compose(words), parse_arguments(words), python="python"))
    command = ["sbatch", "--test-only", str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def start_daemons(folder: Path, environment: dict[str, str]) -> None:
    """Starts the daemons, which go to the background. Skips if one does not start, as in a restricted container."""
    munge = [f"--{name}={folder / file}" for name, file in (("key-file", "key"), ("socket", "munge.sock"), ("seed-file", "seed"))]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"]
    for words in (["munged", "--force", *munge], ["slurmctld", "-c"], ["slurmd", "-N", "host0"], ["slurmd", "-N", "host1"]):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            pytest.skip(f"{words[0]} does not start here: {done.stderr.strip()}")
    for _ in range(120):
        listed = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environment, capture_output=True, text=True, check=False)
        if listed.stdout.split() == ["idle", "2"]:
            return
        time.sleep(0.25)
    pytest.skip(f"Slurm's hosts do not come up here: {listed.stdout} {listed.stderr}")


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
