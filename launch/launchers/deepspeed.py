"""launch=deepspeed: DeepSpeed's own launcher starts the ranks, on this host or, with a hostfile and ssh, on several."""

import shlex
import shutil
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config, ConfigError
from ...train.config.overrides import split_override
from ...train.config.own_files import new_run_folder, write_whole
from ...train.config.schema import quoted
from .cluster import cluster_arguments, print_not_started, rank_arguments, shell_command, submit, without_secrets

PORT = 29500
"""DeepSpeed's default port."""
MODULE = ["--no_local_rank", "--module", "tokenyard.train"]


def start_deepspeed(config: Config, arguments: Arguments) -> int:
    """Starts the ranks on one host. For several it writes the hostfile and prints the command, and runs it if launch.submit=true.

    Returns the exit code. Raises ConfigError if DeepSpeed is not installed, or cannot pass an override to the other hosts.
    """
    if config.launch.nodes == 1:
        return submit([_executable(), *one_host(config, arguments)])
    own, words = several_hosts(config, arguments)
    _hostfile(config).parent.mkdir(parents=True, exist_ok=True)
    write_whole(_hostfile(config), hostfile(config))
    print(without_secrets(f"# {_hostfile(config)}\n{hostfile(config)}\n{shell_command(['deepspeed', *own], words)}"), flush=True)
    if config.launch.submit:
        return submit([_executable(), *own, *words])
    print_not_started("run the command above")
    return 0


def one_host(config: Config, arguments: Arguments) -> list[str]:
    """Returns the arguments of `deepspeed` for ranks on this host."""
    folder = [f"run.dir={quoted(new_run_folder())}"] if config.run.dir is None else []
    own = ["--num_gpus", str(config.launch.ranks), "--master_port", _meeting_point(config)[1]]
    return [*own, *MODULE, *rank_arguments(arguments), *folder]


def several_hosts(config: Config, arguments: Arguments) -> tuple[list[str], list[str]]:
    """Returns the arguments of `deepspeed` on one of several hosts: its own, and those of the ranks.

    Raises ConfigError for an override that would not arrive unchanged.
    """
    host, port = _meeting_point(config)
    own = ["--hostfile", str(_hostfile(config)), "--master_addr", host, "--master_port", port, *MODULE]
    return own, [_through_shell(word) for word in cluster_arguments(config, arguments)]


def hostfile(config: Config) -> str:
    """Returns the contents of the hostfile: a line for each host."""
    return "".join(f"{host} slots={config.launch.ranks}\n" for host in config.launch.hosts)


def _through_shell(word: str) -> str:
    """Quotes an argument: DeepSpeed passes them unquoted to the hosts' shells and breaks those with spaces; pdsh expands %."""
    if any(character in " %\n" for character in word):
        rule = "DeepSpeed's launcher cannot carry a space, % or line break to other hosts"
        raise ConfigError.of(*split_override(word), rule, "launch=torchrun on each host")
    return shlex.quote(word)


def _meeting_point(config: Config) -> tuple[str, str]:
    """Returns the host and port where the ranks meet: those of rank 0."""
    if config.launch.rendezvous is None:
        return (config.launch.hosts or ["localhost"])[0], str(PORT)
    host, _, port = config.launch.rendezvous.rpartition(":")
    return host, port


def _executable() -> str:
    """Returns the `deepspeed` command of this interpreter's environment, or of the PATH."""
    own = Path(sys.executable).parent / "deepspeed"
    found = str(own) if own.is_file() else shutil.which("deepspeed")
    if found is None:
        rule = "the package deepspeed is not installed"
        raise ConfigError.of("launch", "deepspeed", rule, "launch=torchrun or pip install 'tokenyard[deepspeed]'")
    return found


def _hostfile(config: Config) -> Path:
    assert config.run.dir is not None
    return Path(config.run.dir) / "hostfile"
