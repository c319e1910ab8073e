"""Published models are trained as published: experiments, and a warning for the tutorial's settings."""

import logging

import pytest
from tokenyard.train.config.compose import compose
from tokenyard.train.config.published import published_experiments, warn_of_toy_settings
from tokenyard.train.preflight import check_config

EXPERIMENTS = ["deepseek_moe_16b", "gpt_oss_20b", "mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b", "switch_base_8"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_trains_its_model_without_a_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = compose([f"experiment={name}"])
    assert config.model == compose([f"model={name}"]).model and published_experiments(config) == [name]
    check_config(config, 1)
    warn_of_toy_settings(config)
    assert caplog.text == ""


def test_tokens_of_a_run_are_those_of_its_paper() -> None:
    """In units of 1e12."""
    tokens = {}
    for name in ("olmoe_1b_7b", "deepseek_moe_16b", "switch_base_8"):
        config = compose([f"experiment={name}"])
        tokens[name] = config.steps * config.batch.sequences * config.sequence_length / 1e12
    assert tokens == pytest.approx({"olmoe_1b_7b": 5.133, "deepseek_moe_16b": 2.0, "switch_base_8": 0.576}, rel=5e-3)


def test_switch_is_fine_tuned_with_the_dropout_of_its_paper() -> None:
    """Section 4.1: 0.1, in the experts 0.4, 16000 steps of 2**20 tokens. Neither its pre-training nor its presets have any."""
    config = compose(["experiment=switch_base_8_fine_tuning"])
    assert (config.model.dropout, config.model.moe.dropout, config.steps) == (0.1, 0.4, 16000)
    assert config.batch.sequences * config.sequence_length == 2**20
    check_config(config, 1)
    for words in (["experiment=switch_base_8"], ["model=switch_base_8"], ["model=switch_c_2048"], ["model=tiny_switch"]):
        model = compose(words).model
        assert (model.dropout, model.moe.dropout, model.moe.z_coefficient) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model=olmoe_1b_7b"], "optimizer.lr=0.005, sequence_length=128: made for a model of a tutorial, and this one has 6.9B"),
        (["model=olmoe_1b_7b", "optimizer.lr=1e-4"], "sequence_length=128: made for a model of a tutorial"),
        (["model=deepseek_v3"], f"train with experiment={' or '.join(EXPERIMENTS)}"),
        (["model=mixtral_8x7b"], "published models train with experiment=mixtral_8x7b"),
    ],
)
def test_the_settings_of_the_tutorial_are_warned_about_in_one_line(
    words: list[str], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_toy_settings(compose(words))
    (record,) = caplog.records
    assert named in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("words", [[], ["model=tiny"], ["model=olmoe_1b_7b", "optimizer.lr=4e-4", "sequence_length=2048"]])
def test_others_are_not(words: list[str], caplog: pytest.LogCaptureFixture) -> None:
    warn_of_toy_settings(compose(words))
    assert caplog.text == ""
