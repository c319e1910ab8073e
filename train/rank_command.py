"""Runs one rank of a training run, from its command line to its exit code. Errors of usage are found before torch is imported."""

import os
import sys
import time

from ..data.errors import DataUnavailable
from .config.complain import BAD_USAGE, complain, say
from .config.compose import parse_arguments
from .config.config import Config, ConfigError
from .config.elastic import fit_to_ranks
from .config.environment import restarts_share_store, world_size
from .fault_tolerance.signals import ignore_signals, install_handlers
from .preflight import check_config, check_start
from .saved_run import with_run
from .weight_source import compose_run

SHARED_STORE = "torchrun --max-restarts: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it, or restarted ranks look for killed ones"


def run_rank(argv: list[str]) -> int:
    """Runs `python -m tokenyard.train`: this process is one rank, given by the environment. Returns the exit code."""
    try:
        arguments = with_run(parse_arguments(argv))
        if arguments.prints():
            from .show import show

            return show(arguments)
        if arguments.multirun:
            raise ConfigError("--multirun: a rank runs one configuration; nearest valid: tokenyard train -m ...")
        config, _ = compose_run(arguments)
        fitted = fit_to_ranks(config, world_size())
        check_config(config, world_size())
        check_start(config)
        if fitted is not None and os.environ.get("RANK", "0") == "0":
            say(fitted)
    except ConfigError as error:
        return refuse(error)
    except DataUnavailable as stop:
        return refuse(stop, stop.exit_code)
    return run_here(config)


def run_here(config: Config) -> int:
    """Trains with this process as one rank. Returns the exit code."""
    if restarts_share_store() and os.environ.get("RANK") == "0":
        print(f"tokenyard: {SHARED_STORE}", file=sys.stderr)
    install_handlers()
    try:
        from .run import run  # imports torch: about two seconds, which an error above does not cost

        return run(config)
    finally:
        ignore_signals()


def refuse(error: ConfigError | DataUnavailable, code: int = BAD_USAGE) -> int:
    """Prints an error of the configuration or of a source, once for all ranks. Returns the exit code."""
    if os.environ.get("RANK", "0") == "0":
        complain(error)
    else:
        time.sleep(2)  # launchers end all ranks with the first, which should be the one that prints
    return code
