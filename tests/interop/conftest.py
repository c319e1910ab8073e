"""Tiny random models of transformers, saved in folders."""

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "max_position_embeddings": 64,
}
MODULES = {
    "Mixtral": "mixtral",
    "Qwen2Moe": "qwen2_moe",
    "Qwen3Moe": "qwen3_moe",
    "DeepseekV2": "deepseek_v2",
    "DeepseekV3": "deepseek_v3",
    "GptOss": "gpt_oss",
    "Olmoe": "olmoe",
    "Glm4Moe": "glm4_moe",
    "Dots1": "dots1",
    "Ernie4_5_Moe": "ernie4_5_moe",
    "MiniMaxM2": "minimax_m2",
    "Glm4MoeLite": "glm4_moe_lite",
    "SolarOpen": "solar_open",
    "GraniteMoe": "granitemoe",
    "FlexOlmo": "flex_olmo",
    "LongcatFlash": "longcat_flash",
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3Next": "qwen3_next",
    "Qwen3_5Moe": "qwen3_5_moe",
}


@pytest.fixture
def build() -> Callable[..., Any]:
    """`build("Mixtral", num_local_experts=4)`: their model with random weights (norms and biases too), in fp32, and evaluating."""
    pytest.importorskip("transformers", reason="comparisons need transformers (pip install 'tokenyard[hf]')")
    return built


@pytest.fixture
def widest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`widest("Mixtral")`: transformers widens norms, angles and routers to fp32 even in an fp64 model; from now on to fp64."""

    def widen(family: str) -> None:
        for name in (f"models.{MODULES[family]}.modeling_{MODULES[family]}", "modeling_rope_utils"):
            monkeypatch.setattr(importlib.import_module(f"transformers.{name}"), "torch", Widest())
        monkeypatch.setattr(Tensor, "float", Tensor.double)

    return widen


class Widest:
    """torch, whose fp32 is fp64."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name in ("float", "float32") else getattr(torch, name)


def built(family: str, **settings: Any) -> Any:
    import transformers

    settings_of = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    config = settings_of(**{**BASE, **settings})
    config._attn_implementation = config._experts_implementation = "eager"
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of empty tensors, where a shared expert has no width
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    torch.manual_seed(0)  # what its construction drew depends on the types of its weights
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" not in name:
            drawn = torch.empty(tensor.shape)  # in fp32, whatever the type, so that the numbers are the same
            tensor.data.copy_(torch.nn.init.normal_(drawn, mean=0.5 if "norm" in name else 0.0, std=0.3) if len(drawn) else drawn)
    return model


@pytest.fixture
def saved(build: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`saved("Mixtral")`: the folder of such a model, saved by transformers."""

    def save(family: str, **settings: Any) -> Path:
        folder = tmp_path / f"theirs_{family}"
        build(family, **settings).save_pretrained(folder)
        return folder

    return save
