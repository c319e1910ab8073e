"""Composes a typed Config of the arguments of a command line, or raises a ConfigError of one line."""

import argparse
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from .config import Config, ConfigError
from .overrides import (
    Groups,
    as_hydra_override,
    check_composed,
    check_overrides,
    find_groups,
    parse_override,
    split_override,
    target_error,
)
from .schema import nearest_text, quoted, settings, suggest, todays_value, unknown_key_error, wrong_value_error
from .usual_names import usual_name

# The flags of `tokenyard train`. All other arguments are overrides of the configuration.

INFO = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
"""The choices of Hydra's --info."""


def parse_arguments(argv: list[str]) -> "Arguments":
    """Splits flags and overrides, in any order. Raises ConfigError for a flag that does not exist."""
    parser = ArgumentParser("tokenyard train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    # deepspeed and older versions of torch pass the rank as an argument; it is read from the environment.
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--from", dest="from_run", metavar="RUN_FOLDER")
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--hydra-help", action="store_true")
    parser.add_argument("-r", "--resolve", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job", "hydra", "all"])
    parser.add_argument("-p", "--package")
    parser.add_argument("--layout-only", action="store_true")
    parser.add_argument("-i", "--info", nargs="?", const="all", choices=INFO)
    arguments, unknown = parser.parse_known_intermixed_args(argv, Arguments())
    split = [text.partition("=") for text in arguments.overrides]
    arguments.overrides = [f"{key}{equals}{todays_value(key, value)}" for key, equals, value in split]
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        key, _, value = unknown[0].lstrip("-").partition("=")
        if key.replace("-", "_") in settings() or usual_name(key):
            rule = "there is no such flag, settings are key=value"
            raise ConfigError(f"{unknown[0]}: {rule}; nearest valid: {suggest(key.replace('-', '_'), value, {})}")
        raise ConfigError(f"{unknown[0]}: there is no such flag; nearest valid: {nearest_text(unknown[0], flags)}")
    if arguments.retry and not arguments.multirun:
        raise ConfigError("--retry: runs the failed points of a sweep again; nearest valid: -m --retry")
    if (arguments.resolve or arguments.package) and not arguments.prints():
        raise ConfigError("--resolve and --package: belong to --cfg; nearest valid: --cfg job --resolve")
    return arguments


class Arguments(argparse.Namespace):
    """The command line of `tokenyard train`. Most flags are Hydra's own."""

    overrides: list[str]
    multirun: bool
    retry: bool
    """Whether points of a sweep that failed run again."""
    from_run: str | None
    """The folder of a run to take settings from."""
    config_dir: str | None
    help: bool
    hydra_help: bool
    resolve: bool
    cfg: str | None
    package: str | None
    info: str | None
    layout_only: bool

    def prints(self) -> bool:
        """Whether a flag asks for output instead of a run."""
        return bool(self.help or self.hydra_help or self.cfg or self.info or self.layout_only)


class ArgumentParser(argparse.ArgumentParser):
    """Raises ConfigErrors, so that wrong flags are reported like wrong overrides."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


CONF = Path(__file__).resolve().parents[2] / "conf"
"""The Hydra groups: a folder for each group, a file for each option."""


def compose(argv: list[str]) -> Config:
    """Returns the configuration of the overrides in `argv`; arguments of launchers are skipped.

    Raises ConfigError for wrong ones.
    """
    return compose_arguments(parse_arguments(argv))


def compose_arguments(arguments: Arguments) -> Config:
    """Like `compose`, for parsed arguments."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    groups = check_arguments(arguments)
    register_schema()
    # Hydra's compose function takes all folders as one override.
    folders = [quoted(f"file://{folder}") for folder in own_folders(arguments)]
    search_path = [f"hydra.searchpath=[{','.join(folders)}]"] if folders else []
    overrides = [text for text in arguments.overrides if split_override(text)[0] != SEARCH_PATH]
    with one_line_errors(groups), initialize_config_dir(config_dir=str(CONF), version_base=None):
        composed = hydra_compose("config", [*search_path, *map(as_hydra_override, overrides)])
        check_composed(OmegaConf.to_container(composed, resolve=True), groups)
        config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    return config


def check_arguments(arguments: Arguments, sweep: bool = False) -> Groups:
    """Returns all groups and their options. Raises ConfigError for a wrong override or a missing folder of --config-dir."""
    groups = find_groups([CONF, *own_folders(arguments)])
    check_overrides(arguments.overrides, groups, sweep)
    return groups


SEARCH_PATH = "hydra.searchpath"


def own_folders(arguments: Arguments) -> list[Path]:
    """Returns the folders of the user's own groups: --config-dir and hydra.searchpath. Raises ConfigError for a missing one."""
    given = [("--config-dir", arguments.config_dir)] if arguments.config_dir is not None else []
    for text in arguments.overrides:
        if split_override(text)[0] == SEARCH_PATH:
            value = parse_override(text, {}).value()
            given += [(SEARCH_PATH, str(each).strip("'\"")) for each in (value if isinstance(value, list) else [value])]
    folders = []
    for key, text in given:
        folder = Path(text.removeprefix("file://")).expanduser().resolve()
        if not folder.is_dir():
            existing = next(parent for parent in folder.parents if parent.is_dir())
            nearest = f"{key}=[{existing}]" if key == SEARCH_PATH else f"{key}={existing}"
            raise ConfigError.of(key, text, "must be an existing folder", nearest)
        folders.append(folder)
    return folders


@functools.cache
def register_schema() -> None:
    """Registers the dataclasses with Hydra, once, as `schema`, the first entry of the defaults list in conf/config.yaml."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


@contextmanager
def one_line_errors(groups: Groups) -> Iterator[None]:
    """Turns exceptions of Hydra, OmegaConf and YAML into ConfigErrors."""
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
    # An error in a YAML file is known only by its text, which has the file, the value and the full key.
    text = "\n".join(str(link) for link in _causes(error))
    matches = (re.search(pattern, text) for pattern in (r"In '(.*?)'", r"full_key: (.*)", r"[Vv]alue '(.*?)'"))
    file, key, value = (match[1] if match else "" for match in matches)
    if "_target_" in key:
        return target_error(key, "...", groups)
    if key and key not in settings():
        return unknown_key_error(key, value or "...", groups)
    if key and value:
        return wrong_value_error(key, value)
    nearest = f"; nearest valid: {suggest(key, '', groups)}" if key else ""
    return ConfigError(f"{file or key or 'configuration'}: {' '.join(text.partition('full_key')[0].split())}{nearest}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
