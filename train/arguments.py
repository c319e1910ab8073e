"""The flags of `tokenyard train`; whatever is no flag is an override of the configuration."""

import argparse
from typing import NoReturn

from .config import ConfigError
from .schema import nearest_text

INFO = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
"""What Hydra tells about itself with --info."""


def parse_arguments(argv: list[str]) -> "Arguments":
    """Splits flags and overrides, in any order. ConfigError for a flag that does not exist."""
    parser = ArgumentParser("tokenyard train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    # The launchers of deepspeed and of older torch pass the rank so; it is read from the environment.
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("-r", "--resolve", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("-p", "--package")
    parser.add_argument("--layout-only", action="store_true")
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=INFO)
    arguments, unknown = parser.parse_known_intermixed_args(argv, Arguments())
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise ConfigError(f"{unknown[0]}: there is no such flag; nearest valid: {nearest_text(unknown[0], flags)}")
    if (arguments.resolve or arguments.package) and not arguments.prints():
        raise ConfigError("--resolve and --package: belong to --cfg; nearest valid: --cfg job --resolve")
    return arguments


class Arguments(argparse.Namespace):
    """The command line of `tokenyard train`; all but the overrides and `multirun` is for Hydra or for nobody."""

    overrides: list[str]
    multirun: bool
    config_dir: str | None
    help: bool
    hydra_help: bool
    resolve: bool
    cfg: str | None
    package: str | None
    info: str | None
    layout_only: bool

    def prints(self) -> bool:
        """Whether something is to be shown, not run."""
        return bool(self.help or self.hydra_help or self.cfg or self.info or self.layout_only)


class ArgumentParser(argparse.ArgumentParser):
    """Errors are ConfigErrors, so that they are reported as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")
