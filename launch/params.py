"""`tokenyard params`: size and cost of a model, from its configuration or from a Hugging Face folder's config.json."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..train.config.compose import compose, parse_arguments
from ..train.config.config import Config, ConfigError
from ..train.config.environment import world_size
from ..train.config.model_summary import BITS, DEVICE_BYTES, SHARE, check_model_and_layout, facts, intended_ranks, layout_text
from ..train.config.number_format import flops, gigabytes, short
from ..train.rank_command import refuse
from ..train.weight_source import compose_run
from .words import shown_name

PARTS = ("embedding", "attention", "router", "experts", "shared", "dense", "norms", "head")
"""The parts of a model in the order of the table; multi-token prediction comes below the sum."""

LARGEST_CONFIG = 1 << 20
"""Bytes of a config.json."""
PUBLISHED_LENGTH = 4096
"""The sequence length for a Hugging Face folder, unless another one is given."""


def params_command(arguments: Namespace) -> int:
    """Prints the table, one object (--json), or docs/models.md (--table). Returns the exit code."""
    try:
        if arguments.table:
            from .models_page import models_page

            sys.stdout.write(models_page())
            return 0
        name, config = configured(arguments.words)
        world = intended_ranks(config, world_size())
        check_model_and_layout(config, world)
    except ConfigError as error:
        return refuse(error)
    found = {"model": name, **facts(config, world)}
    print(json.dumps(found) if arguments.json else "\n".join(table(found, config)))
    return 0


def configured(words: list[str]) -> tuple[str, Config]:
    """Returns the model's name and the configuration, from overrides and at most one Hugging Face folder."""
    folders = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    chosen = [word for word in overrides if word.lstrip("+~").startswith(("model=", "model."))]
    if len(folders) > 1:
        raise ConfigError(f"{folders[1]}: one folder at a time; nearest valid: tokenyard params {folders[0]}")
    if folders and chosen:
        raise ConfigError(f"{chosen[0]}: {folders[0]} says what the model is; nearest valid: tokenyard params {folders[0]}")
    if not folders:
        return shown_name(overrides), compose_run(parse_arguments(overrides))[0]
    config = compose([f"sequence_length={PUBLISHED_LENGTH}", *overrides])
    config.model = read_model(Path(folders[0]))
    return folders[0], config


def read_model(folder: Path) -> Any:
    """Returns the model that the config.json in `folder` describes. Raises ConfigError if there is none or it is not supported."""
    path = folder / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: has no config.json; nearest valid: tokenyard params model=default")
    from ..checkpoint.bounded import read_regular, strict_json
    from ..interop.config_mapping import read_config

    try:
        described = strict_json(read_regular(path, LARGEST_CONFIG))
        if not isinstance(described, dict):
            raise ValueError(f"{path}: must hold a JSON object")
        # Quantized weights are counted like others.
        described.pop("quantization_config", None)
        return read_config(described, f"{path}: ")[1]
    except (OSError, ValueError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from error


def table(found: dict[str, Any], config: Config) -> list[str]:
    """Returns the lines of the whole output for people."""
    return [*_model(found, config), "", *_parts(found), "", *_memory(found, config), "", *_cost(found)]


def _model(found: dict[str, Any], config: Config) -> list[str]:
    m, share = config.model, found["active"] / found["total"]
    experts = f", experts in {found['moe_layers']}" if found["moe_layers"] else ""
    return [
        _row("model", f"{found['model']}: {m.layers} layers{experts}; {m.width} wide, {m.heads} heads ({m.attention.kind.name})"),
        _row("routing", found["routing"]),
        _row("parameters", f"{short(found['total'])} total, {short(found['active'])} active per token ({share:.1%})"),
    ]


def _parts(found: dict[str, Any]) -> list[str]:
    """Parameters by part: total, active per token, held by a rank."""
    whole, held = found["parts"], found["per_rank"]
    lines = [f"  {'part':12}{'total':>20}{'active':>20}{'a rank holds':>20}"]
    for part in PARTS:
        if whole[part]:
            lines.append(_numbers(part, whole[part], whole["active_experts"] if part == "experts" else whole[part], held[part]))
    if whole["mtp"]:
        lines.append(_numbers("prediction", whole["mtp"], 0, held["mtp"]))
    lines.append(_numbers("all", found["total"], found["active"], held["total"]))
    if whole["mtp"]:
        lines.append("  prediction (multi-token) is trained and held, but neither in the total nor in the active sum")
    return lines


def _memory(found: dict[str, Any], config: Config) -> list[str]:
    held = found["bytes_per_rank"]
    parts = ", ".join(f"{name} {gigabytes(held[name])}" for name in ("weights", "gradients", "optimizer"))
    parts += f"; moments on the host {gigabytes(held['host'])}" if held["host"] else ""
    each = held["total"] / found["per_rank"]["total"]
    inference, devices = found["inference_bytes"], found["devices_of_80_gb"]
    return [
        _row("layout", layout_text(config.parallel, found["world"])),
        _row("training", f"{gigabytes(held['total'])} a rank without activations, {each:.4g} bytes a parameter: {parts}"),
        _row("inference", ", ".join(f"{kind} {gigabytes(inference[kind])}" for kind in BITS)),
        _row("held by", ", ".join(f"{devices[kind]} x {DEVICE_BYTES / 1e9:.0f} GB ({kind})" for kind in BITS)),
        _row("", f"if weights may take {SHARE:.0%} of a device and all are of that type"),
    ]


def _cost(found: dict[str, Any]) -> list[str]:
    length = found["sequence_length"]
    compute = f"{flops(found['flops_per_token'])} per token forward, {flops(found['training_flops_per_token'])} in training"
    return [
        _row("compute", f"{compute}, mean over {length:,} tokens"),
        _row("cache", f"{found['kv_cache_bytes_per_token'] / 1024:,.1f} KiB per token in bf16, mean over {length:,} tokens"),
    ]


def _row(name: str, value: str) -> str:
    return f"{name:12}{value}".rstrip()


def _numbers(name: str, total: int, active: int, rank: int) -> str:
    return f"  {name:12}{total:>20,}{active:>20,}{rank:>20,}"
