"""What a run takes from the tokenizer that is there: of prepared data their tokenizer, and of that the rows of the embedding.

Both become overrides before those of the command line. No torch.
"""

from collections.abc import Mapping
from pathlib import Path

from ..data.config import Corpus, TokenizerConfig, TokenizerKind, mixture_sources
from ..moe.config import ModelConfig
from .config.compose import Arguments, compose_arguments
from .config.config import Config, ConfigError
from .config.launch import Launcher
from .config.overrides import split_override
from .config.rules.rules import BYTE_PIECES
from .config.schema import quoted

ROWS = 128
"""The rows of the embedding are a multiple of this, which usual degrees of tensor parallelism divide and which fills tiles."""


def with_tokenizer(config: Config, arguments: Arguments) -> tuple[Config, Arguments]:
    """Returns the configuration and `arguments` with the tokenizer of prepared data and model.vocabulary, where they are not set.

    Raises ConfigError, one line, for a tokenizer that cannot be opened.
    """
    keys = [split_override(text)[0].lstrip("+~") for text in arguments.overrides]
    if not tokenizer_is_named(config, keys) and config.data.corpus in (Corpus.prepared, Corpus.mix):
        config, arguments = _with(tokenizer_overrides(prepared_tokenizer(config)), config, arguments)
    if config.checkpoint.init is None and "model.vocabulary" not in keys and config.model.vocabulary == ModelConfig().vocabulary:
        rows = _rows(config)
        if rows is not None and rows != config.model.vocabulary and config.model.vocabulary != _resumed_rows(config):
            config, arguments = _with([f"model.vocabulary={rows}"], config, arguments)
    return config, arguments


def tokenizer_is_named(config: Config, keys: list[str]) -> bool:
    """Returns whether the configuration names a tokenizer; `keys` are those of the overrides."""
    return config.tokenizer != TokenizerConfig() or any(key == "tokenizer" or key.startswith("tokenizer.") for key in keys)


def tokenizer_overrides(settings: Mapping[str, str | None]) -> list[str]:
    """Returns the overrides that set a TokenizerConfig's settings."""
    return [f"tokenizer.{key}={'null' if value is None else quoted(value)}" for key, value in settings.items()]


def rows_for(pieces: int) -> int:
    """Returns the rows of an embedding for a tokenizer of `pieces` pieces."""
    return -(-pieces // ROWS) * ROWS


def prepared_tokenizer(config: Config) -> Mapping[str, str | None]:
    """Returns the settings of a TokenizerConfig that opens the tokenizer of the first prepared data; none if there are none."""
    from ..data.pretokenized import TOKENIZER_FOLDER
    from ..data.tokenizer import settings_of_saved

    try:
        prepared = [part.config for part in mixture_sources(config.data) if part.config.corpus is Corpus.prepared]
        folders = [Path(part.path).expanduser() / TOKENIZER_FOLDER for part in prepared if part.path is not None]
        return settings_of_saved(folders[0]) if folders else {}
    except ValueError:  # preflight reports what is wrong with the data
        return {}


def _with(overrides: list[str], config: Config, arguments: Arguments) -> tuple[Config, Arguments]:
    if not overrides:
        return config, arguments
    added = Arguments(**{**vars(arguments), "overrides": [*overrides, *arguments.overrides]})
    return compose_arguments(added), added


def _rows(config: Config) -> int | None:
    """The rows for the tokenizer of the configuration; None if it can only be opened elsewhere, or not at all."""
    settings = config.tokenizer
    if settings.path is None:
        own = {TokenizerKind.bytes: BYTE_PIECES, TokenizerKind.sentencepiece: settings.pieces}
        return rows_for(own[settings.kind]) if settings.kind in own else None  # preflight reports a missing path
    if config.launch.kind is Launcher.kubernetes and not Path(settings.path).expanduser().exists():
        return None  # a path in the container, where the ranks derive it
    from ..data.tokenizer import ready_tokenizer

    try:
        tokenizer = ready_tokenizer(settings)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert tokenizer is not None
    return rows_for(tokenizer.size)


def _resumed_rows(config: Config) -> int | None:
    """The rows in the checkpoint that the run resumes from, which an earlier version may have chosen otherwise."""
    from ..checkpoint.folder import checkpoints_of
    from ..checkpoint.manifest import DamagedCheckpoint, read_manifest

    place = {"auto": config.run.dir, "never": None}.get(config.checkpoint.resume, config.checkpoint.resume)
    for path in checkpoints_of(Path(place)) if place is not None and Path(place).is_dir() else []:
        try:
            return read_manifest(path).facts["config"]["model"]["vocabulary"]
        except (DamagedCheckpoint, KeyError, TypeError):  # preflight reports it
            continue
    return None
