"""What the launchers share: the arguments of the ranks, the name of a job, printing and submitting it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config, ConfigError, Precision
from ...train.config.overrides import split_override
from ...train.config.redact import redact


def rank_arguments(arguments: Arguments) -> list[str]:
    """Returns the flags and overrides for the ranks: all but launch.*."""
    folder = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    return folder + [text for text in arguments.overrides if split_override(text)[0].lstrip("+~").partition(".")[0] != "launch"]


def cluster_arguments(config: Config, arguments: Arguments) -> list[str]:
    """Returns the same for ranks on a cluster, with precision=auto resolved by the GPUs that are requested, not by this host's."""
    words = rank_arguments(arguments)
    if config.precision is not Precision.auto:
        return words
    gpus = config.launch.gpus_of_host(config.device.value)
    precision = Precision.bf16 if gpus else Precision.fp32
    return [*(text for text in words if split_override(text)[0] != "precision"), f"precision={precision.value}"]


def job_name(config: Config) -> str:
    """Returns run.name, or the run folder's name, as a DNS label of at most 63 characters, which Slurm accepts as well."""
    text = config.run.name or Path(config.run.dir or "").name
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"tokenyard-{label}"
    return label[:63].strip("-")


def submit(command: list[str], job: str | None = None) -> int:
    """Runs the cluster's own command, with `job` on its standard input, and returns its exit code.

    Raises ConfigError if there is none.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError.of("launch.submit", "true", f"there is no {command[0]} on this host", "launch.submit=false")
    return subprocess.run(command, input=job, text=True, check=False).returncode


def without_secrets(job: str) -> str:
    """Returns the job as it is printed. Standard error says so if secrets were left out."""
    text = redact(job)
    if text != job:
        print("tokenyard: what is printed has names where the job has secrets; launch.submit=true hands them on", file=sys.stderr)
    return text


def print_not_started(how: str) -> None:
    """Prints to standard error, since standard output holds the job and nothing else."""
    print(f"tokenyard: nothing was started; {how}, or add launch.submit=true", file=sys.stderr)


def shell_command(command: list[str], words: list[str]) -> str:
    """Returns a command for a POSIX shell: `command` on the first line, each of `words` on a line of its own."""
    return " \\\n    ".join([shlex.join(command), *map(shlex.quote, words)])
