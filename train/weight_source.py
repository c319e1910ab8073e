"""Composes the configuration of a run, with what checkpoint.init adds to it. No torch, except for Hugging Face folders.

The model of the source of weights, and its tokenizer unless one is named, become overrides before those of the command line, which
therefore win.
"""

import copy
import os
import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from ..data.checks import nearest_path
from ..data.tokenizer_path import FILES
from ..interop.upcycle import Upcycle, upcycled_config
from ..moe.config import ModelConfig
from ..moe.param_shapes import shapes
from .config.compose import Arguments, compose_arguments
from .config.config import Config, ConfigError, UpcycleConfig
from .config.overrides import split_override
from .config.schema import quoted, written
from .config.serialize import leaves, plain_config
from .tokenizer_source import prepared_tokenizer, tokenizer_is_named, tokenizer_overrides, with_tokenizer

HF_CONFIG = "config.json"
"""The file that makes a folder a Hugging Face folder; ours have none of that name."""
HF_TOKENIZERS = {name: kind for kind, name in FILES.items()}
"""The files that a tokenizer of a Hugging Face folder may be in, the preferred one first."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
BIAS_RATE = "model.moe.balance.bias_rate"
DROPOUT = "model.dropout", "model.moe.dropout"


class WeightSource(NamedTuple):
    """A checkpoint or a Hugging Face folder to take weights from."""

    path: Path
    model: ModelConfig
    tokenizer: Mapping[str, str | None] | None
    """Settings of a TokenizerConfig; None if the source has no tokenizer."""


def compose_run(arguments: Arguments) -> tuple[Config, Arguments]:
    """Returns the configuration of a run, and `arguments` with what checkpoint.init and its tokenizer add to them.

    Raises ConfigError for wrong overrides, for a source that is none, and for a setting that does not fit its weights.
    """
    config = compose_arguments(arguments)
    refuse_idle_upcycle(config)
    if config.checkpoint.init is None:
        return with_tokenizer(config, arguments)
    source = find_source(config)
    keys = [split_override(text)[0].lstrip("+~") for text in arguments.overrides]
    if "model" in keys:
        chosen = split_override(arguments.overrides[keys.index("model")])[1]
        raise ConfigError.of(
            "model", chosen, f"the model is that of checkpoint.init={source.path}", "no model=, single settings of it"
        )
    found = _model_overrides(config.model, source.model)
    if not tokenizer_is_named(config, keys):
        found += _tokenizer_overrides(source, config)
    added = Arguments(**{**vars(arguments), "overrides": [*found, *arguments.overrides]})
    config = compose_arguments(added)
    refuse_unfit(config.model, source)
    upcycle, top_k = config.checkpoint.upcycle, config.model.moe.top_k
    if upcycle.experts is not None and top_k != upcycle.top_k:
        rule = f"is checkpoint.upcycle.top_k={upcycle.top_k} of an upcycled model"
        raise ConfigError.of("model.moe.top_k", top_k, rule, f"checkpoint.upcycle.top_k={top_k}")
    return config, added


def refuse_idle_upcycle(config: Config) -> None:
    """Raises ConfigError for a setting of checkpoint.upcycle that would do nothing."""
    default, checkpoint = vars(UpcycleConfig()), config.checkpoint
    for key, value in vars(checkpoint.upcycle).items():
        if value == default[key] or (checkpoint.init is not None and checkpoint.upcycle.experts is not None):
            continue
        needed = "a dense model in checkpoint.init" if checkpoint.init is None else "checkpoint.upcycle.experts"
        key = f"checkpoint.upcycle.{key}"
        raise ConfigError.of(key, value, f"needs {needed}", f"{key}={written(default[key.rpartition('.')[2]])}")


def find_source(config: Config) -> WeightSource:
    """Returns the source that checkpoint.init names, upcycled; if it is gone, the run's own newest checkpoint, which resumes.

    Raises ConfigError, one line, for a path that is neither a checkpoint nor a run folder with one nor a Hugging Face folder.
    """
    from ..checkpoint.folder import checkpoints_of

    init, folder = config.checkpoint.init, config.run.dir
    assert init is not None
    path = hf_folder(init) or Path(init).expanduser()
    if HUB_NAME.fullmatch(init) and not path.parent.is_dir() and (folder is None or not Path(folder).is_dir()):
        refuse_absent(init)
    if not path.exists() and folder is not None and config.checkpoint.resume == "auto" and checkpoints_of(Path(folder)):
        return _read_source(Path(folder), init)
    source, options = _read_source(path, init), upcycle_options(config)
    if options is None:
        return source
    if source.model.moe.experts:
        rule = f"the model of checkpoint.init={init} has experts already"
        raise ConfigError.of("checkpoint.upcycle.experts", options.experts, rule, "checkpoint.upcycle.experts=null")
    try:
        return source._replace(model=upcycled_config(source.model, options, "checkpoint.upcycle."))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def upcycle_options(config: Config) -> Upcycle | None:
    """Returns what checkpoint.upcycle asks for; the routers are drawn with the seed of the run."""
    wanted = config.checkpoint.upcycle
    return None if wanted.experts is None else Upcycle(wanted.experts, wanted.top_k, wanted.granularity, config.seed)


def _read_source(path: Path, init: str) -> WeightSource:
    from ..checkpoint.folder import checkpoints_of
    from ..checkpoint.manifest import DamagedCheckpoint

    if (path / HF_CONFIG).is_file():
        return _hf_source(path)
    found = checkpoints_of(path) if path.is_dir() else []
    if not found:
        rule = "must be a checkpoint, a run folder with one, or a Hugging Face folder" if path.exists() else "must exist"
        raise ConfigError.of("checkpoint.init", init, rule, f"checkpoint.init={_nearest_source(path)}")
    damage: DamagedCheckpoint | None = None
    for each in found:
        try:
            return _checkpoint_source(each)
        except DamagedCheckpoint as error:
            damage = damage or error
        except ValueError as error:
            raise ConfigError(f"checkpoint.init={init}: {' '.join(str(error).split())}") from error
    raise ConfigError(f"checkpoint.init={init}: {damage}; nearest valid: an undamaged checkpoint")


def refuse_unfit(model: ModelConfig, source: WeightSource) -> None:
    """Raises ConfigError for the first setting of `model` with which it would not have the tensors of the source."""
    if not _fits(model, source.model):
        key = next(
            (key for key in _different(model, source.model) if not _fits(_with(source.model, key, model), source.model)), None
        )
        key = key or _different(model, source.model)[0]
        raise _unfit(key, model, source, "does not fit the weights")
    if source.model.moe.balance.bias_rate > 0 and model.moe.balance.bias_rate == 0:
        raise _unfit(BIAS_RATE, model, source, "the router has expert biases in the weights")


def _unfit(key: str, model: ModelConfig, source: WeightSource, rule: str) -> ConfigError:
    now, there = (written(attrgetter(key.removeprefix("model."))(each)) for each in (model, source.model))
    return ConfigError.of(key, now, f"{rule} of checkpoint.init={source.path}", f"{key}={there}")


def _fits(model: ModelConfig, other: ModelConfig) -> bool:
    try:
        return shapes(model) == shapes(other)
    except (ArithmeticError, TypeError):
        return False


def _different(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns the keys of all settings that differ."""
    ours, theirs = (dict(leaves(plain_config(model), "model.")) for model in (one, other))
    return [key for key in ours if ours[key] != theirs[key]]


def _with(model: ModelConfig, key: str, other: ModelConfig) -> ModelConfig:
    """Returns a copy of `model` whose setting `key` has the value that it has in `other`."""
    changed = copy.deepcopy(model)
    section, _, name = key.removeprefix("model.").rpartition(".")
    setattr(attrgetter(section)(changed) if section else changed, name, attrgetter(key.removeprefix("model."))(other))
    return changed


def _model_overrides(composed: ModelConfig, wanted: ModelConfig) -> list[str]:
    """Returns the overrides that turn the composed model into that of the source. Dropout that an experiment asks for stays."""
    plain, asked = (dict(leaves(plain_config(model), "model.")) for model in (wanted, composed))
    values = ((key, plain[key]) for key in _different(composed, wanted) if key not in DROPOUT or not asked[key])
    return [f"{key}={quoted(value) if isinstance(value, str) else written(value)}" for key, value in values]


def _tokenizer_overrides(source: WeightSource, config: Config) -> list[str]:
    settings = source.tokenizer or prepared_tokenizer(config)
    if not settings:
        nearest = "tokenizer.path=FILE of its tokenizer, or tokenizer=bytes"
        raise ConfigError.of("checkpoint.init", source.path, "has no tokenizer, and none is named", nearest)
    return tokenizer_overrides(settings)


def _hf_source(path: Path) -> WeightSource:
    from ..interop.load_weights import open_source  # imports torch

    try:
        model = open_source(path).model
    except ValueError as error:
        raise ConfigError(f"checkpoint.init: {' '.join(str(error).split())}") from error  # which begins with the path
    return WeightSource(path, model, hf_tokenizer(path))


def hf_folder(path: str | Path) -> Path | None:
    """Returns `path` if it is a Hugging Face folder, and of a name the model that was downloaded to the hub's cache; else None."""
    folder = Path(path).expanduser()
    if (folder / HF_CONFIG).is_file():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(str(path)):
        return None
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    model = cache / f"models--{str(path).replace('/', '--')}"
    main = model / "refs" / "main"
    commit = main.read_text().strip() if main.is_file() else ""
    snapshot = model / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and (snapshot / HF_CONFIG).is_file() else None


def refuse_absent(path: str | Path) -> None:
    """Raises ConfigError for a path that does not exist and is no name in the hub's cache; nothing is downloaded."""
    folder = Path(path).expanduser()
    if folder.exists() or hf_folder(path) is not None:
        return
    rule = "there is no such folder"
    if HUB_NAME.fullmatch(str(path)) and not folder.parent.is_dir():
        raise ConfigError(f"{path}: {rule}, and no model of that name in the hub's cache; nearest valid: hf download {path}")
    raise ConfigError(f"{path}: {rule}; the nearest existing path is {nearest_path(folder)}")


def hf_tokenizer(folder: Path) -> dict[str, str] | None:
    """Returns the settings of a TokenizerConfig that opens the tokenizer of a Hugging Face folder, None if it has none."""
    for name, kind in HF_TOKENIZERS.items():
        if (folder / name).is_file():
            return {"kind": kind.name, "path": str(folder / name)}
    return None


def _checkpoint_source(path: Path) -> WeightSource:
    """Raises ValueError for a checkpoint that is damaged or contradicts itself."""
    from ..checkpoint.manifest import BIAS
    from ..data.tokenizer import settings_of_saved
    from .stored_config import read_stored

    manifest, config = read_stored(path)
    if any(name.endswith(BIAS) for name in manifest.tensors):  # an earlier run may have trained them
        config.model.moe.balance.bias_rate = config.model.moe.balance.bias_rate or 0.001
    saved = path / "tokenizer"
    return WeightSource(path, config.model, settings_of_saved(saved) if saved.is_dir() else hf_tokenizer(path / "tokenizer_hf"))


def _nearest_source(path: Path) -> str:
    """Returns the existing path that was probably meant, or a folder in it that holds weights; null if there is none."""
    from ..checkpoint.folder import checkpoints_of

    near = nearest_path(path) if not path.exists() else path
    inside = sorted(near.iterdir()) if near.is_dir() else []
    weights = [each for each in (near, *inside) if each.is_dir() and ((each / HF_CONFIG).is_file() or checkpoints_of(each))]
    return str(weights[0]) if weights else "null"
