"""Presets have the published sizes of their models, and tiny presets differ from their families in sizes only."""

import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenyard
from tokenyard.launch.models_page import CARDS, models_page, unit
from tokenyard.moe.config import ModelConfig
from tokenyard.moe.param_count import count
from tokenyard.train.config.compose import CONF, compose

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
TINY = {
    "tiny_switch": "switch_base_8",
    "tiny_gshard": "gshard_600b",
    "tiny_mixtral": "mixtral_8x7b",
    "tiny_deepseek_moe": "deepseek_moe_16b",
    "tiny_deepseek_v2": "deepseek_v2",
    "tiny_deepseek_v3": "deepseek_v3",
    "tiny_qwen2_moe": "qwen1_5_moe_a2_7b",
    "tiny_qwen3_moe": "qwen3_30b_a3b",
    "tiny_gpt_oss": "gpt_oss_20b",
    "tiny_olmoe": "olmoe_1b_7b",
    "tiny_grok": "grok_1",
    "tiny_glm_4_5": "glm_4_5",
    "tiny_dots_llm1": "dots_llm1",
    "tiny_ernie_4_5": "ernie_4_5_21b_a3b",
    "tiny_minimax_m2": "minimax_m2",
    "tiny_glm_4_7_flash": "glm_4_7_flash",
    "tiny_kimi_k2": "kimi_k2",
    "tiny_solar_open": "solar_open_100b",
    "tiny_granite_moe": "granite_3_0_3b_a800m",
    "tiny_flex_olmo": "flex_olmo_7x7b",
    "tiny_longcat_flash": "longcat_flash",
    "tiny_expert_choice": "expert_choice",
    "tiny_qwen3_next": "qwen3_next_80b_a3b",
}
SIZES = re.compile(
    r"(layers|width|heads|kv_heads|head_width|hidden|vocabulary|dense_first|init_std|embedding_multiplier|attention\.window"
    r"|attention\.(mla|delta)\..*|moe\.(experts|top_k|hidden|shared_hidden)"
    r"|moe\.router\.(groups|top_groups|scale|(null|copy)_experts))$"
)
"""Settings that a tiny preset may change."""


@cache
def preset(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


@pytest.mark.parametrize("name", CARDS)
def test_total_is_the_published_one(name: str) -> None:
    card = CARDS[name]
    assert abs(card.counted_total(count(preset(name))) / 1e9 - float(card.total)) <= unit(card.total)


@pytest.mark.parametrize("name", [name for name, card in CARDS.items() if card.active])
def test_active_is_the_published_one(name: str) -> None:
    card = CARDS[name]
    assert card.active is not None
    assert abs(card.counted_active(count(preset(name))) / 1e9 - float(card.active)) <= unit(card.active)


@pytest.mark.parametrize(("figure", "last_digit"), [("46.7", 0.1), ("57.41", 0.01), ("141", 1), ("600", 100)])
def test_the_last_digit_of_a_figure(figure: str, last_digit: float) -> None:
    assert unit(figure) == pytest.approx(last_digit)


def test_a_quarter_of_groks_experts_is_active() -> None:
    parts = count(preset("grok_1"))
    assert parts.active_experts * 4 == parts.experts


def test_glm_counts_the_prediction_module_and_no_vocabulary() -> None:
    """GLM-4.5 (arXiv:2508.06471, table 1): 355B, of which 32B are active; GLM-4.5-Air: 12B active."""
    large, air = count(preset("glm_4_5")), count(preset("glm_4_5_air"))
    assert round((large.total + large.mtp - large.embedding - large.head) / 1e9) == 355
    assert round((large.active - large.embedding - large.head) / 1e9) == 32
    assert round((air.active - air.embedding - air.head) / 1e9) == 12


def test_flexolmo_with_all_of_its_experts() -> None:
    """FlexOlmo (arXiv:2507.07024, abstract): 37B, of which 20B are active, with eight experts and four of them a token."""
    parts = count(compose(["model=flex_olmo_7x7b", "model.moe.experts=8", "model.moe.top_k=4"]).model)
    assert (int(parts.total / 1e9), int(parts.active / 1e9)) == (37, 20)


def test_longcats_active_parameters_depend_on_the_token() -> None:
    """LongCat-Flash (arXiv:2509.01322, abstract): 18.6B to 31.3B, if all or none of its 12 experts return the token."""
    parts = count(preset("longcat_flash"))
    least = parts.active - parts.embedding - parts.active_experts
    most = least + 12 * parts.experts // 512
    assert (int(least / 1e8), int(most / 1e8)) == (186, 313)


def test_published_extras() -> None:
    """The published checkpoint of DeepSeek-V3 has 14B for prediction, with copies of embedding and head; Switch-base-8 has 619M."""
    v3, switch = count(preset("deepseek_v3")), count(preset("switch_base_8"))
    assert round((v3.mtp + v3.embedding + v3.head) / 1e9, 1) == 13.5
    cross_attention = 12 * 4 * 768 * 768
    assert round((switch.total + cross_attention) / 1e6) == 619


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("default", "dense", "tiny")])
def test_a_preset_names_its_source(name: str) -> None:
    comment = (CONF / "model" / f"{name}.yaml").read_text().partition("\n")[0]
    known = [*NAMES, "arXiv", "config.json", "github.com", *(["Mixtral 8x7B", "OLMoE-1B-7B"] if name.startswith("dense") else [])]
    assert comment.startswith("# ")
    assert any(source in (CONF / "model" / f"{name}.yaml").read_text() for source in known)


@pytest.mark.parametrize("name", ["switch_base_8", "switch_c_2048", "gshard_600b"])
def test_encoder_decoders_say_what_became_of_them(name: str) -> None:
    assert "DECODER-ONLY" in (CONF / "model" / f"{name}.yaml").read_text()


@pytest.mark.parametrize(("tiny", "family"), TINY.items())
def test_a_tiny_model_differs_from_its_family_in_sizes_alone(tiny: str, family: str) -> None:
    ours, theirs = (leaves(asdict(preset(name))) for name in (tiny, family))
    assert [key for key in ours if ours[key] != theirs[key] and not SIZES.match(key)] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("tiny_")])
def test_a_tiny_model_is_tiny(name: str) -> None:
    c = preset(name)
    assert 2 <= c.layers <= 4
    assert (c.width, c.moe.experts, c.vocabulary) == (64, 8, 512)
    assert c.heads % 4 == 0 and c.kv_heads % 2 == 0
    assert count(c).trained < 1e6


def test_every_tiny_model_is_of_a_family_or_a_router() -> None:
    assert {name for name in NAMES if name.startswith("tiny_")} - set(TINY) == {
        "tiny_hash",
        "tiny_sinkhorn",
        "tiny_null",
        "tiny_moe_plus_plus",
    }


@pytest.mark.parametrize(
    ("dense", "sparse"), [("dense", "default"), ("dense_mixtral_8x7b", "mixtral_8x7b"), ("dense_olmoe_1b_7b", "olmoe_1b_7b")]
)
def test_a_dense_baseline_has_the_active_size(dense: str, sparse: str) -> None:
    ours, theirs = count(preset(dense)), count(preset(sparse))
    assert ours.total == ours.active == theirs.active - theirs.router


def test_the_page_of_models_is_up_to_date() -> None:
    page = (Path(tokenyard.__file__).parent / "docs" / "models.md").read_text()
    assert page == models_page(), "tokenyard params --table > docs/models.md"


def test_every_preset_is_on_the_page() -> None:
    page = (Path(tokenyard.__file__).parent / "docs" / "models.md").read_text()
    assert [name for name in NAMES if f"| {name} |" not in page] == []


def leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
