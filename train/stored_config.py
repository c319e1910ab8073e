"""Reads the configuration of a checkpoint that anybody may have written, and checks it before anything is built. No torch here."""

from pathlib import Path

from ..checkpoint.bounded import LARGEST_TOKENIZER, read_regular, strict_json
from ..checkpoint.facts import needed_facts
from ..checkpoint.folder import checkpoints_of
from ..checkpoint.manifest import Manifest, check_fits, check_sizes, check_unlisted, read_manifest
from .config.config import Config, ConfigError
from .config.rules.model_rules import attention, experts
from .config.serialize import config_from_plain

ABOUT = "tokenizer/tokenizer_about.json"


def read_stored(path: Path) -> tuple[Manifest, Config]:
    """Returns manifest and configuration. Raises ValueError if they do not agree with the files or with the tensors."""
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    check_unlisted(path, manifest)
    try:
        config = config_from_plain(needed_facts(manifest.facts, ("config",))["config"])
    except ValueError as error:
        raise ConfigError(f"checkpoint {path}: {error}") from error
    for broken in (*attention(config, 1), *experts(config, 1)):
        raise ConfigError(f"checkpoint {path}: {broken.key}: {broken.rule}")
    check_fits(config.model, manifest.tensors, path)
    check_tokenizer_files(path, manifest)
    return manifest, config


def check_tokenizer_files(path: Path, manifest: Manifest) -> None:
    """Raises ValueError for a tokenizer of an implausible size, or one whose description is no JSON object."""
    for name, record in manifest.attachments.items():
        if record.bytes > LARGEST_TOKENIZER:
            raise ValueError(f"checkpoint {path}: {name} has {record.bytes} bytes, more than {LARGEST_TOKENIZER}")
    if ABOUT in manifest.attachments and not isinstance(strict_json(read_regular(path / ABOUT, 1 << 20)), dict):
        raise ValueError(f"checkpoint {path}: {ABOUT} must be a JSON object")


def check_readable(path: Path) -> None:
    """Raises ValueError for a checkpoint (or the only one of a run) that `read_stored` refuses, before torch is imported."""
    found = checkpoints_of(path)
    if len(found) == 1:
        read_stored(found[0])
