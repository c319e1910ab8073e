"""`tokenyard train`: one process, ranks of our own, or a sweep of jobs."""

from ..train.arguments import parse_arguments
from ..train.command import refuse, run_here, world_size
from ..train.compose import compose_arguments
from ..train.config import ConfigError, Launcher
from ..train.validate import validate
from .torchrun import check_hosts, start_ranks


def train(argv: list[str]) -> int:
    """Returns the exit code: of the run, of the first rank that failed, or 1 if a point of a sweep failed."""
    try:
        arguments = parse_arguments(argv)
        if arguments.prints():
            from ..train.show import show

            return show(arguments)
        if arguments.multirun:
            from .multirun import multirun

            return multirun(arguments)
        config = compose_arguments(arguments)
        started = config.launch.kind is Launcher.torchrun
        validate(config, config.launch.nodes * config.launch.ranks if started else world_size())
        if started:
            check_hosts(config)
    except ConfigError as error:
        return refuse(error)
    return start_ranks(config, argv) if started else run_here(config)
