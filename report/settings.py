"""The configuration for the page: what differs from the defaults first; and what the model holds, by part."""

from typing import Any

from ..train.config import Config, ConfigError
from ..train.params import count
from ..train.plain import config_from_plain, plain_config
from ..train.schema import is_mapping

PARTS = ("embedding", "attention", "router", "experts", "shared", "dense", "norms", "head", "mtp")


def described(plain: dict[str, Any]) -> dict[str, Any]:
    """`settings`: rows of key, value, default (None for a key that the defaults lack) and whether it differs; `parameters`."""
    defaults = dict(leaves(plain_config(Config())))
    rows = [
        {"key": key, "value": text(value), "default": text(defaults[key]) if key in defaults else None}
        for key, value in leaves(plain)
    ]
    for row in rows:
        row["changed"] = row["value"] != row["default"]
    return {"settings": rows, "parameters": parameters(plain)}


def leaves(node: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Each setting with its dotted key."""
    found = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        found += leaves(value, f"{name}.") if isinstance(value, dict) and not is_mapping(name) else [(name, value)]
    return found


def text(value: Any) -> str:
    """As YAML writes it."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def parameters(plain: dict[str, Any]) -> dict[str, Any] | None:
    """Total, active and by part; None for a configuration that this version does not know."""
    if not isinstance(plain.get("model"), dict):
        return None
    try:
        found = count(config_from_plain({"model": plain["model"]}).model)
    except (ConfigError, ArithmeticError, LookupError, TypeError):
        return None
    parts = {part: [getattr(found, part), found.active_experts if part == "experts" else getattr(found, part)] for part in PARTS}
    return {"total": found.total, "active": found.active, "parts": {part: both for part, both in parts.items() if both[0]}}
