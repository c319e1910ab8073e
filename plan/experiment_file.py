"""Writes a layout as an experiment of Hydra, which `tokenyard train experiment=NAME` takes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ..train.config.config import Config, ConfigError
from ..train.config.serialize import leaves, plain_config
from .candidates import Candidate

NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def write_experiment(
    folder: Path, name: str, asked: Config, base: Config, groups: list[str], candidate: Candidate, about: str
) -> Path:
    """Writes experiment/NAME.yaml under `folder`, a folder of Hydra groups: what `asked` with this layout sets other than `base`.

    `base`: what `groups`, lines of a defaults list, give. Raises ConfigError if the name is none, or taken.
    """
    if not NAME.fullmatch(name):
        rule = "must be a name of small letters, digits and _"
        raise ConfigError.of("--write experiment", name, rule, "--write experiment=mine")
    path = folder / "experiment" / f"{name}.yaml"
    if path.exists():
        free = next(f"{name}_{number}" for number in range(2, 1000) if not path.with_name(f"{name}_{number}.yaml").exists())
        raise ConfigError.of("--write experiment", name, f"{path} exists", f"--write experiment={free}")
    batch = replace(asked.batch, sequences=candidate.batch.sequences, micro=candidate.micro)
    host = min(candidate.world, asked.launch.ranks)
    launch = replace(asked.launch, nodes=candidate.world // host, ranks=host)
    wanted = dict(leaves(plain_config(replace(asked, parallel=candidate.parallel, batch=batch, launch=launch))))
    differs = {key: wanted[key] for key, value in leaves(plain_config(base)) if wanted[key] != value}
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ["# @package _global_", f"# {about} on {candidate.world} GPUs, as `tokenyard plan` chose.", "defaults:"]
    path.write_text("\n".join([*head, *(f"  - {group}" for group in groups), _yaml(differs)]))
    return path


def _yaml(settings: dict[str, Any]) -> str:
    """Returns settings by dotted keys as nested YAML, in their order."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return yaml.safe_dump(nested, sort_keys=False)
