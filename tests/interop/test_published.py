"""Published configurations, older keys included, are read completely and equal our presets."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenyard.interop.config_mapping import differences, read_config, write_config
from tokenyard.train.config.compose import compose

PUBLISHED: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "published.json").read_text())
"""By preset."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_our_preset(name: str) -> None:
    family, model = read_config(PUBLISHED[name])
    preset = compose([f"model={name}"]).model
    preset.init_std = model.init_std  # DeepSeek's papers say 0.006, its files 0.02
    assert differences(preset, model) == {}
    assert differences(model, read_config(write_config(family, preset))[1]) == {}
