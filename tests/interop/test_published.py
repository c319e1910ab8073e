"""Published configurations, older keys included, are read completely and equal our presets."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenyard.interop.config_mapping import differences, read_config, write_config
from tokenyard.interop.families import FAMILIES, Family
from tokenyard.moe.config import Scope
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


@pytest.mark.parametrize("family", [family for family in FAMILIES.values() if family.preset], ids=lambda family: family.preset)
def test_a_balance_that_no_key_says_is_that_of_the_preset(family: Family) -> None:
    preset = compose([f"model={family.preset}"]).model
    _, model = read_config(write_config(family, preset))
    assert model.moe.balance == preset.moe.balance and model.moe.z_coefficient == preset.moe.z_coefficient == 0
    assert family.training_note == f"config.json has no loss coefficients: the balance is that of model={family.preset}"


@pytest.mark.parametrize("name", ["gpt_oss_20b", "mixtral_8x7b", "qwen3_30b_a3b"])
def test_a_coefficient_of_the_file_is_that_of_one_loss_of_all_layers(name: str) -> None:
    published = {**PUBLISHED[name], "quantization_config": None}
    family, model = read_config(published)
    balance = model.moe.balance
    assert (balance.scope, balance.pool_layers, family.training_note) == (Scope.batch, True, "")
    coefficient = published.get("router_aux_loss_coef", family.defaults["router_aux_loss_coef"])
    assert balance.coefficient == pytest.approx(coefficient * model.moe.top_k, rel=1e-11)
    assert write_config(family, model)["router_aux_loss_coef"] == pytest.approx(coefficient, rel=1e-11)
    layers = sum(model.moe_layer(index) for index in range(model.layers))
    balance.pool_layers, balance.coefficient = False, balance.coefficient / layers
    assert write_config(family, model)["router_aux_loss_coef"] == pytest.approx(coefficient, rel=1e-11)
