"""launch=slurm: a batch script that runs launch=torchrun on each host; a requeued job resumes from its newest checkpoint."""

import shlex
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config
from ...train.config.own_files import write_whole
from .cluster import cluster_arguments, job_name, print_not_started, shell_command, submit, without_secrets


def start_job(config: Config, arguments: Arguments) -> int:
    """Writes the script to the run folder, prints it, and submits it if launch.submit=true. Returns the exit code."""
    script = batch_script(config, arguments, "python3" if config.launch.slurm.container else sys.executable)
    file = _folder(config) / "job.sh"
    # Slurm does not create the folder of the log, and without it a job fails silently.
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, script, 0o600)  # with the values of overrides, which may be secrets
    print(without_secrets(script), end="", flush=True)
    if config.launch.submit:
        return submit(["sbatch", str(file)])
    print_not_started(f"sbatch {file}")
    return 0


def batch_script(config: Config, arguments: Arguments, python: str) -> str:
    """Returns the script. `python` is the interpreter on the hosts or in the container."""
    head = "\n".join(f"#SBATCH {option}" for option in _options(config))
    c = config.launch
    own = ["launch=torchrun", f"launch.nodes={c.nodes}", f"launch.ranks={c.ranks}", f"launch.max_restarts={c.max_restarts}"]
    ranks = shell_command([python, "-m", "tokenyard", "train"], [*cluster_arguments(config, arguments), *own])
    logs = shlex.quote(str(_folder(config) / "%j-%N.log"))
    image = [f"--container-image={c.slurm.container}"] if c.slurm.container else []
    mounts = [f"--container-mounts={','.join(c.slurm.mounts)}"] if c.slurm.mounts else []
    container = "".join(f" {shlex.quote(option)}" for option in [*image, *mounts])
    ranks = RANKS.format(logs=logs, ranks=ranks, container=container)
    start = PLAIN.format(ranks=ranks)
    if c.slurm.spares:
        folders = [str(config.run.dir), *filter(None, [config.checkpoint.local.folder])]
        device = config.device.value if c.gpus_of_host(config.device.value) else "cpu"
        check = shlex.join([python, "-m", "tokenyard.launch.host_check", str(c.ranks), device, *folders])
        start = SPARES.format(
            nodes=c.nodes,
            check=check,
            container=container,
            ranks=ranks.replace("srun ", f'srun --nodes={c.nodes} --nodelist="${{hosts// /,}}" '),
        )
    setup = "".join(f"\n{line}" for line in c.slurm.setup)
    return BATCH.format(head=head, warning=c.slurm.warning, cores=c.cores, setup=setup, start=start)


BATCH = """\
#!/bin/bash
{head}

# Slurm's warning, {warning} seconds before the time limit: the ranks are stopped and the job is put into the queue again. When it
# starts, it goes on from the newest checkpoint of the run folder.
warned=
stop() {{
    warned=yes
    echo "tokenyard: the time limit is near: stopping the ranks, then requeueing job $SLURM_JOB_ID"
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap stop USR1

export OMP_NUM_THREADS={cores}{setup}
{start}
if [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
RANKS = """\
# One launcher on each host; it starts the ranks there. All hosts run the same command.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --open-mode=append --output={logs}{container} \\
    {ranks} \\
    launch.rendezvous="$rendezvous" &
step=$!

# A trapped signal ends `wait`, not the ranks.
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done
"""
PLAIN = """\
rendezvous=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))

{ranks}"""
SPARES = """\

# The job has more hosts than it needs. Those that fail a check are left out, and the first {nodes} of the others run the ranks.
passed=$(mktemp -d)
out=" "
choose_hosts() {{
    checks=
    for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        case "$out" in *" $host "*) continue ;; esac
        rm -f "$passed/$host"
        (srun --nodes=1 --ntasks=1 --nodelist="$host" --time=10{container} {check} && touch "$passed/$host") &
        checks="$checks $!"
    done
    wait $checks
    hosts=
    for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        case "$out" in *" $host "*) continue ;; esac
        if [ -e "$passed/$host" ]; then
            hosts="$hosts $host"
        else
            out="$out$host "
            echo "tokenyard: host $host fails the check and is left out"
        fi
    done
    hosts=$(echo $hosts | cut -d " " -f 1-{nodes})
}}

# If the ranks fail, all hosts are checked again. With a spare host instead of one that has failed they go on from the newest
# checkpoint; if all of their hosts pass, the failure was another one, and the job ends. Without a spare it is queued again.
starts=0 used= code=1
while choose_hosts; [ "$hosts" != "$used" ]; do
    if [ "$(echo $hosts | wc -w)" -lt {nodes} ]; then
        echo "tokenyard: fewer than launch.nodes={nodes} hosts pass the check"
        if [ "$starts" -gt 0 ]; then warned=yes; fi
        break
    fi
    rendezvous=${{hosts%% *}}:$((20000 + (SLURM_JOB_ID + starts) % 10000))
    used=$hosts starts=$((starts + 1))

{ranks}
    if [ "$code" = 0 ] || [ -n "$warned" ]; then break; fi
done
rm -rf "$passed"
"""


def _options(config: Config) -> list[str]:
    """Returns the options of sbatch, for #SBATCH lines."""
    c, gpus = config.launch, config.launch.gpus_of_host(config.device.value)
    given = [f"--{name}={value}" for name, value in (("partition", c.slurm.partition), ("account", c.slurm.account)) if value]
    return [
        f"--job-name={job_name(config)}",
        *given,
        f"--nodes={c.nodes + c.slurm.spares}",
        *(["--no-kill"] if c.slurm.spares else []),
        "--ntasks-per-node=1",
        f"--cpus-per-task={c.ranks * c.cores}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *([f"--mem={c.memory_gib}G"] if c.memory_gib else []),
        f"--time={c.slurm.time}",
        f"--signal=B:USR1@{c.slurm.warning}",
        "--requeue",
        "--open-mode=append",
        f"--output={_folder(config) / '%j.log'}",
        *c.slurm.lines,
    ]


def _folder(config: Config) -> Path:
    """Returns the folder of the script and the logs."""
    assert config.run.dir is not None
    return Path(config.run.dir) / "slurm"
