"""The words of `tokenyard plan` and `audit` that are no overrides of `tokenyard train`."""

from collections.abc import Collection, Iterable
from pathlib import Path

from ..train.config.config import ConfigError
from ..train.config.schema import nearest_text


def split_words(words: list[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the values of the words key=value whose key is among `own`, by key, and the other words."""
    mine = [word for word in words if "=" in word and word.partition("=")[0] in own]
    return dict(word.split("=", 1) for word in mine), [word for word in words if word not in mine]


def named_models(words: list[str]) -> list[str]:
    """Returns the words with model=NAME for a bare name, which is neither an override nor a folder."""
    return [word if "=" in word or Path(word).is_dir() else f"model={word}" for word in words]


def shown_name(words: list[str]) -> str:
    """Returns what a model is called: the last model=NAME of overrides, else the last experiment=NAME."""
    named = [word.partition("=")[2] for group in ("experiment=", "model=") for word in words if word.startswith(group)]
    return (named or ["default"])[-1]


def aligned(rows: list[list[str]], left: int = 1) -> list[str]:
    """Returns lines of cells under each other: the first `left` columns to the left, the others, of numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    place = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(put(cell, width) for put, cell, width in zip(place, row, widths, strict=True)) for row in rows]


def one_of(key: str, text: str, known: Iterable[str]) -> str:
    """Returns `text`. Raises ConfigError if it is not among `known`."""
    known = list(known)
    if text not in known:
        raise ConfigError.of(key, text, f"must be one of {', '.join(known)}", f"{key}={nearest_text(text, known)}")
    return text


def whole_number(key: str, text: str, least: int) -> int:
    """Returns the number that `text` is. Raises ConfigError if it is none or below `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ConfigError.of(key, text, f"must be a whole number from {least} on", f"{key}={least}")
    return int(text)


def positive_number(key: str, text: str, near: str) -> float:
    """Returns the positive number that `text` is. Raises ConfigError, in which `near` is the valid value."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError.of(key, text, "must be a number above 0", f"{key}={near}")
    return value
