"""The data sources of a configuration: a single one, or the entries of data.mix. Standard library only."""

import shlex
from dataclasses import replace
from typing import NamedTuple

from .config import Corpus, DataConfig

WORDS = ("weight", "label", "corpus", "path", "pattern", "name", "subset", "split", "revision", "column", "repeat")


class MixtureSource(NamedTuple):
    """A source and its share of the tokens."""

    label: str
    weight: float
    config: DataConfig


def mixture_sources(config: DataConfig) -> list[MixtureSource]:
    """Returns the sources of `config`. Raises ValueError, one line, for an entry of data.mix that cannot be parsed."""
    if config.corpus is not Corpus.mix:
        return [MixtureSource(config.corpus.value, 1.0, config)]
    parts = [_parse(entry, config) for entry in config.mix]
    labels = [part.label for part in parts]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"data.mix: two sources are called {label}; give each a label=, as label={label}2")
    return parts


def _parse(entry: str, config: DataConfig) -> MixtureSource:
    split = [word.partition("=") for word in shlex.split(entry)]
    words: dict[str, str] = {key: value for key, _, value in split}
    for key, value in words.items():
        if key not in WORDS or not value:
            raise ValueError(f"data.mix: '{key}={value}' in '{entry}' must be one of {', '.join(WORDS)} and a value")
    weight, label = _weight(words.pop("weight", "1"), entry), words.pop("label", None)
    corpus, repeat = words.pop("corpus", ""), words.pop("repeat", "true")
    single = [kind.value for kind in Corpus if kind is not Corpus.mix]
    if corpus not in single:
        raise ValueError(f"data.mix: corpus={corpus} in '{entry}' must be one of {', '.join(single)}")
    if repeat not in ("true", "false"):
        raise ValueError(f"data.mix: repeat={repeat} in '{entry}' must be true or false")
    plain = replace(config, corpus=Corpus[corpus], mix=[], path=None, name=None, subset=None)
    part = replace(plain, repeat=repeat == "true", **words)  # pyright: ignore[reportArgumentType]
    return MixtureSource(label or _label(part), weight, part)


def _weight(text: str, entry: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"data.mix: weight={text} in '{entry}' must be a number above 0; the nearest is weight=1")
    return weight


def _label(config: DataConfig) -> str:
    """Returns the source's name in metrics: the last part of its name or path that is not a pattern."""
    place = config.name or config.path or config.corpus.value
    words = [word for word in place.replace("\\", "/").split("/") if word and "*" not in word and "{" not in word]
    return (words or [config.corpus.value])[-1].split(".")[0]
