"""Jobs for Slurm, Kubernetes and DeepSpeed against golden files, the cluster's schema and the shells that run them."""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_schema import TRAIN_JOB, violations
from tokenyard.launch.host_check import problem
from tokenyard.launch.launchers.cluster import cluster_arguments, job_name, shell_command
from tokenyard.launch.launchers.deepspeed import hostfile, one_host, several_hosts
from tokenyard.launch.launchers.kubernetes import as_yaml, train_job
from tokenyard.launch.launchers.slurm import batch_script
from tokenyard.launch.main import main
from tokenyard.train.config.compose import compose, parse_arguments
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.preflight import check_config

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
SIZE = ["launch.nodes=2", "launch.ranks=8", "parallel.expert=8", "batch.sequences=128"]
SLURM = ["launch=slurm", *SIZE, "run.dir=runs/first"]
KUBERNETES = ["launch=kubernetes", *SIZE, "run.dir=/shared/runs/first", "launch.kubernetes.image=registry/tokenyard:0.2.0"]
DEEPSPEED = ["launch=deepspeed", *SIZE, "run.dir=runs/first", "launch.hosts=[host0,host1]"]
NASTY = """run.name='a "b" $(touch pwned) `touch pwned`; touch pwned # $HOME *'"""
"""An override that a shell must not expand."""


def composed(words: list[str]) -> tuple[Config, Any]:
    config = compose(words)
    check_config(config, config.launch.nodes * config.launch.ranks)
    return config, parse_arguments(words)


def equals_golden(name: str, text: str) -> None:
    if os.environ.get("TOKENYARD_GOLDEN") == "write":
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


def test_slurm_script() -> None:
    lines = ["launch.slurm.partition=gpu", "launch.slurm.account=lab", "launch.slurm.lines=['--constraint=h100']", "seed=2"]
    script = batch_script(*composed([*SLURM, *lines, "launch.max_restarts=1"]), python="python")
    equals_golden("slurm.sh", script)
    image = [
        "launch.slurm.container='nvcr.io#nvidia/pytorch:26.06-py3'",
        "launch.slurm.mounts=['/shared:/shared','/data:/data:ro']",
    ]
    setup = ["launch.slurm.setup=['module load cuda/12.8','ulimit -l unlimited']", "launch.memory_gib=1500"]
    more = batch_script(*composed([*SLURM, *lines, *image, *setup, "launch.max_restarts=1"]), python="python")
    added = [line for line in more.splitlines() if line not in script.splitlines()]
    assert bash_reads(more) and added[:3] == ["#SBATCH --mem=1500G", "module load cuda/12.8", "ulimit -l unlimited"]
    options = "--container-image=nvcr.io#nvidia/pytorch:26.06-py3 --container-mounts=/shared:/shared,/data:/data:ro"
    assert options in shlex.join(shlex.split(added[3].removesuffix("\\"))).replace("'", "")
    spare = batch_script(*composed([*SLURM, *image, "launch.slurm.spares=1"]), python="python")
    assert bash_reads(spare) and spare.count("--container-image=") == 2, "hosts are checked in the container too"
    assert bash_reads(script)
    assert not bash_reads(script + "\nif")


def test_train_job() -> None:
    words = [*KUBERNETES, "launch.kubernetes.claim=data", "launch.kubernetes.namespace=lab", "seed=2"]
    text = as_yaml(train_job(*composed(words)))
    equals_golden("train_job.yaml", text)
    assert violations(yaml.safe_load(text), TRAIN_JOB) == []


def test_train_job_with_all_that_a_cluster_may_want() -> None:
    own = "shared_memory_gib=64 secrets=['WANDB_API_KEY=wandb/api_key'] queue=research tolerations=['nvidia.com/gpu']"
    words = [*KUBERNETES, *(f"launch.kubernetes.{word}" for word in own.split()), "launch.memory_gib=1500"]
    job = yaml.safe_load(as_yaml(train_job(*composed(words))))
    assert violations(job, TRAIN_JOB) == []
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "research"}
    secret = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api_key"}}}
    assert job["spec"]["trainer"]["env"][1:] == [secret]
    assert job["spec"]["trainer"]["resourcesPerNode"]["requests"] == {"cpu": "32", "memory": "1500Gi"}
    [patched] = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = patched["template"]["spec"]["template"]["spec"]
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}}]
    assert pod["containers"] == [{"name": "node", "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]}]
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists"}]


def test_deepspeed_hosts() -> None:
    config, arguments = composed([*DEEPSPEED, "seed=2", "tracker.names=[]"])
    own, ranks = several_hosts(config, arguments)
    equals_golden("deepspeed.txt", f"{hostfile(config)}\n{shell_command(['deepspeed', *own], ranks)}\n")
    # Once through the local shell, once through the hosts'.
    assert shlex.split(" ".join(shlex.split(" ".join(map(shlex.quote, ranks))))) == [
        *SIZE[2:],
        "run.dir=runs/first",
        "seed=2",
        "tracker.names=[]",
        "precision=bf16",
    ]


@pytest.mark.parametrize(
    ("words", "written"),
    [
        ([], ["precision=bf16"]),
        (["precision=auto"], ["precision=bf16"]),
        (["precision=fp32"], ["precision=fp32"]),
        (["experiment=eight_gpus"], ["experiment=eight_gpus"]),
        (["device=cpu"], ["device=cpu", "precision=fp32"]),
        (["launch.gpus=0"], ["precision=fp32"]),
    ],
)
def test_a_job_says_its_precision(words: list[str], written: list[str]) -> None:
    for launch in (SLURM, KUBERNETES, DEEPSPEED):
        config, arguments = composed([*words, *launch])
        found = cluster_arguments(config, arguments)
        assert [word for word in found if word.partition("=")[0] in ("precision", "device", "experiment")] == written


def test_deepspeed_on_one_host() -> None:
    words = one_host(*composed(["launch=deepspeed", "launch.ranks=2", "parallel.expert=2", NASTY, "run.dir=x"]))
    assert words[:4] == ["--num_gpus", "2", "--master_port", "29500"]
    assert words[4:] == ["--no_local_rank", "--module", "tokenyard.train", "parallel.expert=2", NASTY, "run.dir=x"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["metadata", "name"], "Upper"),
        (["spec", "trainer", "numProcPerNode"], "auto"),
        (["spec", "trainer", "nodes"], 2),
        (["spec", "trainer", "command"], "torchrun"),
        (["spec", "runtimeRef"], {}),
        (["spec", "trainer", "resourcesPerNode", "requests", "cpu"], 32),
    ],
)
def test_the_schema_can_refuse(path: list[str], value: Any) -> None:
    job = train_job(*composed(KUBERNETES))
    place = job
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert violations(job, TRAIN_JOB)


def test_an_override_is_read_as_typed_in_a_slurm_job(tmp_path: Path) -> None:
    """bash runs the whole script with stubs of Slurm's commands; srun records its arguments."""
    script = batch_script(*composed([*SLURM, NASTY]), python="python")
    stub(tmp_path, "srun", 'printf "%s\\0" "$@" > srun.txt')
    stub(tmp_path, "scontrol", "echo host0; echo host1")
    done = run_in(tmp_path, ["bash", "-c", script], SLURM_JOB_ID="7", SLURM_JOB_NODELIST="host[0-1]", SLURM_CPUS_PER_TASK="32")
    assert (done.returncode, done.stderr) == (0, "")
    words = (tmp_path / "srun.txt").read_text().split("\0")
    assert NASTY in words
    assert "launch.rendezvous=host0:20007" in words
    assert not (tmp_path / "pwned").exists()


def test_a_warned_slurm_job_is_requeued_and_one_that_failed_is_not(tmp_path: Path) -> None:
    script = batch_script(*composed(SLURM), python="python")
    stub(tmp_path, "scontrol", 'echo "$@" >> scontrol.txt')
    stub(tmp_path, "scancel", 'echo "$@" > scancel.txt; kill -TERM "$(cat srun.pid)"')
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[0-1]", "SLURM_CPUS_PER_TASK": "32"}
    stub(tmp_path, "srun", 'echo $$ > srun.pid; trap "exit 143" TERM; kill -USR1 $PPID; while :; do sleep 0.05; done')
    assert run_in(tmp_path, ["bash", "-c", script], **job).returncode == 143
    assert (tmp_path / "scancel.txt").read_text() == "--signal=TERM 7\n"
    assert (tmp_path / "scontrol.txt").read_text().splitlines() == ["show hostnames host[0-1]", "requeue 7"]
    (tmp_path / "scontrol.txt").unlink()
    stub(tmp_path, "srun", "exit 3")
    assert run_in(tmp_path, ["bash", "-c", script], **job).returncode == 3
    assert (tmp_path / "scontrol.txt").read_text().splitlines() == ["show hostnames host[0-1]"]


SRUN = r"""
echo "$@" >> srun.txt
for word in "$@"; do case "$word" in --nodelist=*) list=${word#--nodelist=} ;; esac; done
case " $* " in
*host_check*) ! grep -qx "$list" failed.txt ;;
*) cat fails_next.txt >> failed.txt 2>/dev/null || exit "$CODE"; rm fails_next.txt; exit 1 ;;
esac
"""
"""Hosts named in failed.txt fail the check; those in fails_next.txt fail with the ranks, once. Else the ranks end with CODE."""


@pytest.mark.parametrize(
    ("failed", "fails_next", "code", "started", "requeued"),
    [
        ([], [], 0, ["host0,host1"], False),
        (["host0"], [], 0, ["host1,host2"], False),
        (["host0"], ["host2"], 0, ["host1,host2", "host1,host3"], False),
        ([], ["host0", "host1", "host2"], 0, ["host0,host1"], True),
        ([], [], 3, ["host0,host1"], False),
        (["host0", "host1", "host2"], [], 1, [], False),
    ],
)
def test_spare_hosts(
    failed: list[str], fails_next: list[str], code: int, started: list[str], requeued: bool, tmp_path: Path
) -> None:
    """A host that fails the check is left out; one that fails later is replaced; too few after a start: into the queue again."""
    config, arguments = composed([*SLURM, "launch.slurm.spares=2", "checkpoint.local.folder=/dev/shm/tokenyard"])
    script = batch_script(config, arguments, python="python")
    assert "#SBATCH --nodes=4\n#SBATCH --no-kill\n" in script
    stub(tmp_path, "srun", SRUN)
    stub(tmp_path, "scontrol", 'echo "$@" >> scontrol.txt; printf "host%d\\n" 0 1 2 3')
    (tmp_path / "failed.txt").write_text("".join(f"{host}\n" for host in failed))
    if fails_next:
        (tmp_path / "fails_next.txt").write_text("".join(f"{host}\n" for host in fails_next))
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host[0-3]", "SLURM_CPUS_PER_TASK": "32", "CODE": str(code)}
    done = run_in(tmp_path, ["bash", "-c", script], **job)
    assert done.stderr == "" and (done.returncode == code or requeued)
    calls = (tmp_path / "srun.txt").read_text().splitlines()
    checks, starts = [c for c in calls if "host_check" in c], [c for c in calls if "host_check" not in c]
    assert [call.partition("--nodelist=")[2].split()[0] for call in starts] == started
    ports = [call.partition("launch.rendezvous=")[2] for call in starts]
    assert ports == [f"{hosts.partition(',')[0]}:{20007 + place}" for place, hosts in enumerate(started)]
    assert all("host_check 8 auto runs/first /dev/shm/tokenyard" in check for check in checks)
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text().splitlines()) == requeued
    for host in failed:
        assert sum(f"--nodelist={host} " in check for check in checks) == 1


def test_the_check_of_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem(2, "cpu", [str(tmp_path / "new")]) is None and list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert "FileExistsError" in str(problem(2, "cpu", [str(tmp_path / "file")]))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert problem(2, "auto", []) == "it has 1 GPUs for launch.ranks=2"


def test_kubernetes_puts_no_variable_into_an_override() -> None:
    job = train_job(*composed([*KUBERNETES, "run.name='$(HOME) $$(HOME) $HOME $$'"]))
    assert "run.name='$(HOME) $$(HOME) $HOME $$'" in [expanded(word) for word in job["spec"]["trainer"]["args"]]
    assert expanded("a $(HOME) $$(HOME)") == "a VALUE $(HOME)"


def test_submitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    path = os.environ["PATH"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", *SLURM]) == 0
    shown, said = capfd.readouterr()
    assert shown == (tmp_path / "runs/first/slurm/job.sh").read_text()
    assert said == "tokenyard: nothing was started; sbatch runs/first/slurm/job.sh, or add launch.submit=true\n"
    assert main(["train", *KUBERNETES, "launch.submit=true"]) == 2
    assert "launch.submit=true: there is no kubectl on this host" in capfd.readouterr().err
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}")
    stub(tmp_path, "sbatch", 'cat "$1" > sbatch.txt; echo "Submitted batch job 7"; exit 4')
    stub(tmp_path, "kubectl", 'echo "$@" > kubectl.args; cat > kubectl.yaml')
    assert main(["train", *SLURM, "launch.submit=true"]) == 4
    assert capfd.readouterr().out == f"{shown}Submitted batch job 7\n"
    assert (tmp_path / "sbatch.txt").read_text() == shown
    assert main(["train", *KUBERNETES, "launch.submit=true"]) == 0
    assert (tmp_path / "kubectl.args").read_text() == "create -f -\n"
    assert (tmp_path / "kubectl.yaml").read_text() == capfd.readouterr().out


def test_a_secret_in_an_override_reaches_the_job_and_not_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cluster's own command gets the secret as it was typed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_API_KEY", "a-secret-value")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, file in (("sbatch", '"$1"'), ("kubectl", ""), ("deepspeed", "")):
        stub(tmp_path, name, f'echo "$@" > {name}.txt; cat {file} >> {name}.txt')
    monkeypatch.setattr("tokenyard.launch.launchers.deepspeed._executable", lambda: str(tmp_path / "deepspeed"))
    for verb, words in (("sbatch", SLURM), ("kubectl", KUBERNETES), ("deepspeed", DEEPSPEED)):
        assert main(["train", *words, "run.name=a-secret-value", "launch.submit=true"]) == 0
        shown = "".join(capfd.readouterr())
        assert "a-secret-value" not in shown and "<MY_API_KEY>" in shown, verb
        assert "a-secret-value" in (tmp_path / f"{verb}.txt").read_text()
    assert stat.S_IMODE((tmp_path / "runs/first/slurm/job.sh").stat().st_mode) == 0o600


@pytest.mark.parametrize("words", [["seed=' 1'"], ["run.name=100%"], ["run.name='a\nb'"]])
def test_deepspeed_refuses_what_it_would_break(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="cannot carry a space, % or line break"):
        several_hosts(*composed([*DEEPSPEED, *words]) if "seed" not in words[0] else (compose(DEEPSPEED), parse_arguments(words)))


@pytest.mark.parametrize(
    ("name", "label"),
    [("first", "first"), ("a b/C_d", "a-b-c-d"), ("2026-11-22", "tokenyard-2026-11-22"), ("x" * 70, "x" * 63), ("--", "tokenyard")],
)
def test_names_of_jobs(name: str, label: str) -> None:
    config = Config()
    config.run.name = name
    assert job_name(config) == label


REFUSED = [
    ([*SLURM, "run.dir=null"], "run.dir=null: must be a folder that all hosts see with launch=slurm", "run.dir=/shared/runs/NAME"),
    ([*SLURM, "run.dir='a b'"], "run.dir=a b: may hold letters", "run.dir=a_b"),
    ([*SLURM, "run.dir='a%j'"], "run.dir=a%j: may hold letters", "run.dir=a_j"),
    ([*SLURM, "checkpoint.resume=never"], "checkpoint.resume=never: must be auto", "checkpoint.resume=auto"),
    ([*SLURM, "launch.slurm.time=1d"], "launch.slurm.time=1d: must be HH:MM:SS", "launch.slurm.time=24:00:00"),
    ([*SLURM, "launch.slurm.time='00:05:00'"], "launch.slurm.warning=300: must be below", "launch.slurm.warning=299"),
    ([*SLURM, "launch.slurm.partition='a b'"], "launch.slurm.partition=a b: must be a name", "launch.slurm.partition=null"),
    ([*SLURM, "launch.slurm.lines=['qos=high']"], "'qos=high' must be one option of sbatch", "launch.slurm.lines=[]"),
    ([*SLURM, 'launch.slurm.lines=["--a\nrm"]'], "must be one option of sbatch", "launch.slurm.lines=[]"),
    ([*SLURM, "launch.slurm.lines=['--time=1','--qos=q']"], "--time comes from launch.slurm.time", "launch.slurm.lines=[--qos=q]"),
    ([*SLURM, "launch.rendezvous=a:1"], "launch=slurm finds the hosts itself", "launch.rendezvous=null"),
    ([*SLURM, "launch.cores=0"], "launch.cores=0: must be in [1, inf)", "launch.cores=1"),
    ([*SLURM, "launch.slurm.mounts=['/a:/a']"], "launch.slurm.mounts=[/a:/a]: must be []", "launch.slurm.mounts=[]"),
    ([*SLURM, "launch.slurm.container='a b'"], "launch.slurm.container=a b: must be the name", "launch.slurm.container=null"),
    ([*SLURM, 'launch.slurm.setup=["a\nb",c]'], "is not a line of bash", "launch.slurm.setup=[c]"),
    ([*SLURM, "launch.slurm.lines=['--mem=1G']"], "--mem comes from launch.memory_gib", "launch.slurm.lines=[]"),
    ([*KUBERNETES, "launch.kubernetes.secrets=['A=b']"], "'A=b' is not VARIABLE=SECRET/KEY", "launch.kubernetes.secrets=[]"),
    ([*KUBERNETES, "launch.kubernetes.tolerations=['a b']"], "'a b' is not the key of a taint", "tolerations=[]"),
    (KUBERNETES[:-1], "launch.kubernetes.image=null: must be the name", "launch.kubernetes.image=REGISTRY/NAME:TAG"),
    ([*KUBERNETES, "run.dir=runs/x"], "run.dir=runs/x: must be an absolute path in the containers", "run.dir=/shared/x"),
    (
        [*KUBERNETES, "run.dir=/a/x", "launch.kubernetes.claim=c"],
        "must lie under launch.kubernetes.mount=/shared",
        "run.dir=/shared/x",
    ),
    ([*KUBERNETES, "launch.kubernetes.namespace=A"], "launch.kubernetes.namespace=A: must be lower-case", "namespace=null"),
    ([*DEEPSPEED, "launch.hosts=[a]"], "launch.hosts=[a]: must name the launch.nodes=2 hosts", "launch.hosts=[host0,host1]"),
    ([*DEEPSPEED, "launch.hosts=[a,a]"], "each once", "launch.hosts=[host0,host1]"),
    ([*DEEPSPEED, "launch.hosts=['a;b',c]"], "'a;b' is no name of a host", "launch.hosts=["),
    ([*DEEPSPEED, "launch.max_restarts=1"], "launch=deepspeed starts no ranks again", "launch.max_restarts=0"),
    (["launch=torchrun", "launch.rendezvous=host"], "launch.rendezvous=host: must be HOST:PORT", "launch.rendezvous=host:29500"),
    (["launch=torchrun", "launch.rendezvous='h:70000'"], "with a port below 65536", "launch.rendezvous=h:29500"),
    (["launch=torchrun", "launch.rendezvous='-x:1'"], "must be HOST:PORT", "launch.rendezvous=HOST:29500"),
]


@pytest.mark.parametrize(("words", "rule", "nearest"), REFUSED, ids=[" ".join(words[-2:]) for words, _, _ in REFUSED])
def test_a_wrong_job_is_refused(words: list[str], rule: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        composed(list({word.partition("=")[0]: word for word in words}.values()))
    found, _, mended = str(error.value).partition("; nearest valid: ")
    assert rule in found and nearest in mended


def bash_reads(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False).returncode == 0


def stub(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(stat.S_IRWXU)


def run_in(folder: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        words, cwd=folder, env={**os.environ, **path, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def expanded(word: str) -> str:
    """Expands a word as Kubernetes does: $$ is a dollar, $(NAME) a variable."""
    return re.sub(r"\$\$|\$\(\w+\)", lambda match: "$" if match[0] == "$$" else "VALUE", word)


@pytest.mark.parametrize("words", [SLURM, KUBERNETES, DEEPSPEED], ids=["slurm", "kubernetes", "deepspeed"])
def test_a_job_is_shown_without_secrets(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Standard error says that secrets are left out, since the printed job would not run."""
    monkeypatch.setenv("SOME_API_KEY", "s3cr3t-value-of-it")
    more = [f"run.dir={tmp_path}/run", "run.name=s3cr3t-value-of-it", "data=jsonl", "data.path=https://me:passw0rd@host/a.jsonl"]
    assert main(["train", *(word for word in words if not word.startswith("run.dir")), *more]) == 0
    said = capsys.readouterr()
    assert "s3cr3t" not in said.out + said.err and "passw0rd" not in said.out + said.err
    assert "<SOME_API_KEY>" in said.out and "has names where the job has secrets" in said.err
