"""`tokenyard train`: trains in this process, starts ranks, prints or submits a job for a cluster, or runs a sweep."""

from ..data.errors import DataUnavailable
from ..train.config.compose import Arguments, parse_arguments
from ..train.config.config import Config, ConfigError
from ..train.config.elastic import check_host_counts
from ..train.config.environment import world_size
from ..train.config.launch import Launcher
from ..train.preflight import check_config, check_start
from ..train.rank_command import refuse, run_here
from ..train.saved_run import with_run
from ..train.weight_source import compose_run


def train_command(argv: list[str]) -> int:
    """Returns the exit code of the run, of the first rank that failed, or 1 if a point of a sweep failed."""
    try:
        arguments = with_run(parse_arguments(argv))
        if arguments.prints():
            from ..train.show import show

            return show(arguments)
        if arguments.multirun:
            from .sweep import multirun

            return multirun(arguments)
        config, _ = compose_run(arguments)
        started = config.launch.kind is not Launcher.inline
        check_config(config, config.launch.nodes * config.launch.ranks if started else world_size())
        check_host_counts(config)
        check_start(config)
        return start(config, arguments, argv)
    except ConfigError as error:
        return refuse(error)
    except DataUnavailable as stop:
        return refuse(stop, stop.exit_code)


def start(config: Config, arguments: Arguments, argv: list[str]) -> int:
    """Starts a valid configuration with its launcher. Returns the exit code. Raises ConfigError if that is not possible here."""
    match config.launch.kind:
        case Launcher.inline:
            return run_here(config)
        case Launcher.torchrun:
            from .launchers.torchrun import check_hosts, start_ranks

            check_hosts(config)
            return start_ranks(config, argv)
        case Launcher.deepspeed:
            from .launchers.deepspeed import start_deepspeed

            return start_deepspeed(config, arguments)
        case Launcher.slurm:
            from .launchers.slurm import start_job

            return start_job(config, arguments)
        case Launcher.kubernetes:
            from .launchers.kubernetes import start_train_job

            return start_train_job(config, arguments)
