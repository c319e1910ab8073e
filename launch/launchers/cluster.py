"""What a job on other hosts gets of this command line, and how it is shown and handed to the cluster's own command."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config, ConfigError, Precision
from ...train.config.overrides import halves
from ...train.config.redact import redact


def handed_on(arguments: Arguments) -> list[str]:
    """The flags and overrides that the ranks need: all but those of the launcher."""
    folder = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    return folder + [text for text in arguments.overrides if halves(text)[0].lstrip("+~").partition(".")[0] != "launch"]


def handed_to_cluster(config: Config, arguments: Arguments) -> list[str]:
    """The same for hosts of which this one knows nothing but what was asked for: the precision is written out."""
    words = handed_on(arguments)
    if config.precision is not Precision.auto:
        return words
    gpus = config.launch.gpus_of_host(config.device.value)
    precision = Precision.bf16 if gpus else Precision.fp32
    return [*(text for text in words if halves(text)[0] != "precision"), f"precision={precision.value}"]


def job_name(config: Config) -> str:
    """run.name, or the run folder's, as a DNS label of at most 63 characters, which is a name for Slurm as well."""
    text = config.run.name or Path(config.run.dir or "").name
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"tokenyard-{label}"
    return label[:63].strip("-")


def submit(command: list[str], job: str | None = None) -> int:
    """Runs the cluster's own command, with `job` on its standard input. Returns its exit code. ConfigError if it is not there."""
    if shutil.which(command[0]) is None:
        raise ConfigError.of("launch.submit", "true", f"there is no {command[0]} on this host", "launch.submit=false")
    return subprocess.run(command, input=job, text=True, check=False).returncode


def shown(job: str) -> str:
    """A job as it is printed: without secrets, of which standard error says that they are left out."""
    text = redact(job)
    if text != job:
        print("tokenyard: what is printed has names where the job has secrets; launch.submit=true hands them on", file=sys.stderr)
    return text


def say_not_started(how: str) -> None:
    """On standard error, so that standard output is the job and nothing else."""
    print(f"tokenyard: nothing was started; {how}, or add launch.submit=true", file=sys.stderr)


def joined(command: list[str], words: list[str]) -> str:
    """`command` on one line of a POSIX shell, each of `words` on a further one."""
    return " \\\n    ".join([shlex.join(command), *map(shlex.quote, words)])
