"""launch=slurm: a batch script that runs launch=torchrun on each host; a requeued job resumes from its newest checkpoint."""

import shlex
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config
from ...train.config.private_files import write_private
from .cluster import cluster_arguments, job_name, print_not_started, shell_command, submit, without_secrets


def start_job(config: Config, arguments: Arguments) -> int:
    """Writes the script to the run folder, prints it, and submits it if launch.submit=true. Returns the exit code."""
    script = batch_script(config, arguments, sys.executable)
    file = _folder(config) / "job.sh"
    # Slurm does not create the folder of the log, and without it a job fails silently.
    file.parent.mkdir(parents=True, exist_ok=True)
    write_private(file, script)
    print(without_secrets(script), end="", flush=True)
    if config.launch.submit:
        return submit(["sbatch", str(file)])
    print_not_started(f"sbatch {file}")
    return 0


def batch_script(config: Config, arguments: Arguments, python: str) -> str:
    """Returns the script. `python` is the interpreter on the hosts."""
    head = "\n".join(f"#SBATCH {option}" for option in _options(config))
    c = config.launch
    own = ["launch=torchrun", f"launch.nodes={c.nodes}", f"launch.ranks={c.ranks}", f"launch.max_restarts={c.max_restarts}"]
    ranks = shell_command([python, "-m", "tokenyard", "train"], [*cluster_arguments(config, arguments), *own])
    logs = shlex.quote(str(_folder(config) / "%j-%N.log"))
    return BATCH.format(head=head, warning=c.slurm.warning, cores=c.cores, logs=logs, ranks=ranks)


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

rendezvous=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
export OMP_NUM_THREADS={cores}

# One launcher on each host; it starts the ranks there. All hosts run the same command.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 --open-mode=append --output={logs} \\
    {ranks} \\
    launch.rendezvous="$rendezvous" &
step=$!

# A trapped signal ends `wait`, not the ranks.
wait "$step"; code=$?
while kill -0 "$step" 2>/dev/null; do wait "$step"; code=$?; done

if [ -n "$warned" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _options(config: Config) -> list[str]:
    """Returns the options of sbatch, for #SBATCH lines."""
    c, gpus = config.launch, config.launch.gpus_of_host(config.device.value)
    given = [f"--{name}={value}" for name, value in (("partition", c.slurm.partition), ("account", c.slurm.account)) if value]
    return [
        f"--job-name={job_name(config)}",
        *given,
        f"--nodes={c.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={c.ranks * c.cores}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
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
