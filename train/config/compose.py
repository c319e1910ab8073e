"""From the words of a command line to one typed Config, or one line that says what is wrong with them."""

import argparse
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .config import Config, ConfigError
from .overrides import Groups, check_composed, check_overrides, find_groups, forced, refuse_target
from .schema import nearest_text, quoted, refuse_key, refuse_value, settings, suggest

# The flags of `tokenyard train`; whatever is no flag is an override of the configuration.

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


CONF = Path(__file__).resolve().parents[2] / "conf"
"""The Hydra groups: a folder each, an option each file."""


def compose(argv: list[str]) -> Config:
    """The configuration that the overrides in `argv` make; launchers' own arguments are left out. ConfigError if they make none."""
    return compose_arguments(parse_arguments(argv))


def compose_arguments(arguments: Arguments) -> Config:
    """As compose, from arguments that are split already."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    groups = check_arguments(arguments)
    register_schema()
    with one_line_errors(groups), initialize_config_dir(config_dir=str(CONF), version_base=None):
        composed = hydra_compose("config", [*_search_path(arguments), *map(forced, arguments.overrides)])
        check_composed(OmegaConf.to_container(composed, resolve=True), groups)
        config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def check_arguments(arguments: Arguments, sweep: bool = False) -> Groups:
    """ConfigError for a wrong override or a missing --config-dir; otherwise the groups that there are."""
    folders = [CONF]
    if arguments.config_dir is not None:
        folders.append(Path(arguments.config_dir).resolve())
    if not folders[-1].is_dir():
        existing = next(folder for folder in folders[-1].parents if folder.is_dir())
        raise ConfigError.of("--config-dir", folders[-1], "must be an existing folder", f"--config-dir={existing}")
    groups = find_groups(folders)
    check_overrides(arguments.overrides, groups, sweep)
    return groups


@functools.cache
def register_schema() -> None:
    """Makes the dataclasses known to Hydra, once, as `schema`, which the defaults list in conf/config.yaml begins with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


@contextmanager
def one_line_errors(groups: Groups) -> Iterator[None]:
    """Turns what Hydra, OmegaConf and YAML raise into ConfigErrors."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise _one_line(error, groups) from error


def _one_line(error: Exception, groups: Groups) -> ConfigError:
    from hydra.errors import MissingConfigException

    if isinstance(error, ConfigError):
        return error
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        rule = f"must be one of {', '.join(error.options)}"
        return ConfigError.of(group, option, rule, f"{group}={nearest_text(option, error.options)}")
    # Errors in YAML files reach us as text alone, which names the file, the value and the full key.
    text = "\n".join(str(link) for link in _causes(error))
    file, key, value = (_find(pattern, text) for pattern in (r"In '(.*?)'", r"full_key: (.*)", r"[Vv]alue '(.*?)'"))
    if "_target_" in key:
        return refuse_target(key, "...", groups)
    if key and key not in settings():
        return refuse_key(key, value or "...", groups)
    if key and value:
        return refuse_value(key, value)
    nearest = f"; nearest valid: {suggest(key, '', groups)}" if key else ""
    return ConfigError(f"{file or key or 'configuration'}: {' '.join(text.partition('full_key')[0].split())}{nearest}")


def _search_path(arguments: Arguments) -> list[str]:
    """--config-dir as the override that Hydra's compose function knows."""
    if arguments.config_dir is None:
        return []
    return [f"hydra.searchpath=[{quoted(f'file://{Path(arguments.config_dir).resolve()}')}]"]


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
