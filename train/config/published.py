"""The experiments in conf/ that train a published model as its authors did, and the warning for a large model that does not."""

import logging
from operator import attrgetter

from ...moe.param_count import count
from .compose import CONF, compose
from .config import Config

log = logging.getLogger("tokenyard")


LARGE = 500_000_000
"""Parameters of a model that nobody trains with the settings of the tutorial."""


def warn_of_toy_settings(config: Config) -> None:
    """Warns in one line if a large model trains with the default rate and length, which are made for a tutorial on a CPU."""
    defaults, parameters = Config(), count(config.model).total
    toys = {
        "optimizer.lr": (config.optimizer.lr, defaults.optimizer.lr),
        "sequence_length": (config.sequence_length, defaults.sequence_length),
    }
    same = [f"{key}={value}" for key, (value, default) in toys.items() if value == default]
    if parameters >= LARGE and same:
        text = f"{', '.join(same)}: made for a model of a tutorial, and this one has {parameters / 1e9:.1f}B parameters"
        log.warning("%s; published models train with experiment=%s", text, " or ".join(published_experiments(config)))


def published_experiments(config: Config) -> list[str]:
    """Returns the experiments in conf/ that train a published model: that of the shape of this one, or all of them."""
    models = {
        name: compose([f"experiment={name}"]).model
        for name in (path.stem for path in sorted((CONF / "experiment").glob("*.yaml")))
        if (CONF / "model" / f"{name}.yaml").exists()
    }
    shape = [attrgetter("layers", "width", "moe.experts", "moe.hidden")(model) for model in (config.model, *models.values())]
    return [name for name, one in zip(models, shape[1:], strict=True) if one == shape[0]] or list(models)
