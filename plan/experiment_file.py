"""Writes a layout as an experiment of Hydra, which `tokenyard train experiment=NAME` takes."""

import re
from pathlib import Path

from ..train.config.config import ConfigError
from .candidates import Candidate

NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


def write_experiment(folder: Path, name: str, candidate: Candidate, model: str, length: int, steps: int, host: int) -> Path:
    """Writes experiment/NAME.yaml under `folder`, a folder of Hydra groups. `host`: GPUs of a host.

    Raises ConfigError if the name is none, or taken.
    """
    if not NAME.fullmatch(name):
        rule = "must be a name of small letters, digits and _"
        raise ConfigError.of("--write experiment", name, rule, "--write experiment=mine")
    path = folder / "experiment" / f"{name}.yaml"
    if path.exists():
        free = next(f"{name}_{number}" for number in range(2, 1000) if not path.with_name(f"{name}_{number}.yaml").exists())
        raise ConfigError.of("--write experiment", name, f"{path} exists", f"--write experiment={free}")
    world, nodes = candidate.world, max(1, candidate.world // host)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(
            [
                "# @package _global_",
                f"# {model} on {world} GPUs, as `tokenyard plan` chose.",
                "defaults:",
                f"  - override /model: {model}",
                "  - override /launch: torchrun",
                f"steps: {steps}",
                f"sequence_length: {length}",
                "precision: bf16",
                "batch:",
                f"  sequences: {candidate.batch.sequences}",
                f"  micro: {candidate.micro}",
                "parallel:",
                *(f"  {setting}: {value}" for setting, value in candidate.settings().items()),
                "launch:",
                f"  nodes: {nodes}",
                f"  ranks: {world // nodes}",
                "",
            ]
        )
    )
    return path
