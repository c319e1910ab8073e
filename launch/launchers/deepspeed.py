"""launch=deepspeed: ranks on this host or, through a hostfile and ssh, on several, started by DeepSpeed's own launcher."""

import shlex
import shutil
import sys
from pathlib import Path

from ...train.config.compose import Arguments
from ...train.config.config import Config, ConfigError
from ...train.config.private_files import new_run_folder, write_private
from ...train.config.schema import quoted
from .cluster import handed_on, handed_to_cluster, joined, say_not_started, shown, submit

PORT = 29500
"""DeepSpeed's own default."""


def start_deepspeed(config: Config, arguments: Arguments) -> int:
    """Starts the ranks of one host; for several writes the hostfile and shows the command, and runs it with launch.submit=true.

    Returns the exit code. ConfigError if DeepSpeed is not installed, or could not carry an override to the other hosts.
    """
    if config.launch.nodes == 1:
        return submit([_executable(), *one_host(config, arguments)])
    own, words = several_hosts(config, arguments)
    _hostfile(config).parent.mkdir(parents=True, exist_ok=True)
    write_private(_hostfile(config), hostfile(config))
    print(shown(f"# {_hostfile(config)}\n{hostfile(config)}\n{joined(['deepspeed', *own], words)}"), flush=True)
    if config.launch.submit:
        return submit([_executable(), *own, *words])
    say_not_started("run the command above")
    return 0


def one_host(config: Config, arguments: Arguments) -> list[str]:
    """The arguments of `deepspeed` for ranks on this host."""
    folder = [f"run.dir={quoted(new_run_folder())}"] if config.run.dir is None else []
    own = ["--num_gpus", str(config.launch.ranks), "--master_port", _meeting_point(config)[1]]
    return [*own, *MODULE, *handed_on(arguments), *folder]


def several_hosts(config: Config, arguments: Arguments) -> tuple[list[str], list[str]]:
    """The arguments of `deepspeed` on one of several hosts: its own, and the ranks'.

    ConfigError for an override that would not arrive unchanged.
    """
    host, port = _meeting_point(config)
    own = ["--hostfile", str(_hostfile(config)), "--master_addr", host, "--master_port", port, *MODULE]
    return own, [_through_shell(word) for word in handed_to_cluster(config, arguments)]


def hostfile(config: Config) -> str:
    """A line each host."""
    return "".join(f"{host} slots={config.launch.ranks}\n" for host in config.launch.hosts)


MODULE = ["--no_local_rank", "--module", "tokenyard.train"]


def _through_shell(word: str) -> str:
    """DeepSpeed's runner gives the words as they are to the shells of the hosts, but for those with spaces; pdsh replaces %."""
    if any(character in " %\n" for character in word):
        rule = "DeepSpeed's launcher cannot carry a space, % or line break to other hosts"
        raise ConfigError.of(*_halves(word), rule, "launch=torchrun on each host")
    return shlex.quote(word)


def _meeting_point(config: Config) -> tuple[str, str]:
    """Host and port of rank 0."""
    if config.launch.rendezvous is None:
        return (config.launch.hosts or ["localhost"])[0], str(PORT)
    host, _, port = config.launch.rendezvous.rpartition(":")
    return host, port


def _halves(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key, value


def _executable() -> str:
    """The `deepspeed` beside this interpreter, or on the path."""
    beside = Path(sys.executable).parent / "deepspeed"
    found = str(beside) if beside.is_file() else shutil.which("deepspeed")
    if found is None:
        rule = "the package deepspeed is not installed"
        raise ConfigError.of("launch", "deepspeed", rule, "launch=torchrun or pip install 'tokenyard[deepspeed]'")
    return found


def _hostfile(config: Config) -> Path:
    assert config.run.dir is not None
    return Path(config.run.dir) / "hostfile"
