"""--help, --cfg, --info, --hydra-help, answered by a real Hydra application; multirun runs the same one with a task."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from .arguments import Arguments
from .compose import CONF, compose_arguments, register_schema
from .redact import redact
from .show_layout import show_layout


def show(arguments: Arguments) -> int:
    """Prints what the flags ask for, trains nothing. Returns the exit code. ConfigError if the overrides are wrong."""
    if arguments.layout_only:
        return show_layout(arguments)
    compose_arguments(arguments)
    flags = ["--help"] if arguments.help else []
    flags += ["--hydra-help"] if arguments.hydra_help else []
    flags += ["--resolve"] if arguments.resolve else []
    flags += [f"--cfg={arguments.cfg}"] if arguments.cfg else []
    flags += [f"--package={arguments.package}"] if arguments.package else []
    flags += [f"--info={arguments.info}"] if arguments.info else []
    said = io.StringIO()
    with redirect_stdout(said):
        code = hydra_application(lambda config: None, arguments, flags, [])
    sys.stdout.write(redact(said.getvalue()))
    return code


def hydra_application(task: Callable[[Any], object], arguments: Arguments, flags: list[str], overrides: list[str]) -> int:
    """hydra.main on our configuration, with `flags` and with `overrides` after those of `arguments`. Returns the exit code."""
    import hydra

    register_schema()
    # Hydra then raises its errors, for us to report, instead of printing several lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    folder = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    application = hydra.main(config_path=str(CONF), config_name="config", version_base=None)(task)
    # Hydra reads the command line of the process and nothing else.
    before, sys.argv = sys.argv, ["tokenyard train", *flags, *folder, *arguments.overrides, *overrides]
    try:
        application()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
