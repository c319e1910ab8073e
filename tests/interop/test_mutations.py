"""Each key of a full config.json, changed: an accepted one means the same to transformers, and the file as it is imports."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import CASES, YARN
from tokenyard.interop.load_weights import open_source
from torch import nn

from .test_families import IDS

FIRST = {family: name for name, (family, _) in reversed(CASES.items()) if " " not in name}
"""The simplest case of each family."""
ROPES = (
    None,
    {**YARN, "original_max_position_embeddings": 64, "truncate": None},
    {**YARN, "original_max_position_embeddings": 64, "beta_fast": 0, "beta_slow": 0},
    {**YARN, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.5},
    {**YARN, "original_max_position_embeddings": 64, "mscale": 0.7},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 700.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "longrope", "rope_theta": 300.0, "original_max_position_embeddings": 8, "factor": 4.0}
    | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {"rope_theta": 0.0},
)


@pytest.mark.parametrize("family", FIRST)
def test_what_changes_the_model_is_followed_or_refused(family: str, build: Callable[..., Any], tmp_path: Path) -> None:
    model = build(family, **CASES[FIRST[family]][1])
    model.save_pretrained(tmp_path, max_shard_size="1GB")
    config = model.config.to_dict() | {"architectures": [f"{family}ForCausalLM"]}
    compared, refused = 0, 0
    ours: dict[str, torch.Tensor] = {}  # by what the file describes: most keys that change nothing describe one model
    for key, value in [("architectures", config["architectures"]), *mutations(config)]:
        mutated = copy.deepcopy(config) | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(mutated))
        try:
            if (described := repr(open_source(tmp_path).model)) not in ours:
                ours[described] = tokenyard.load_model(tmp_path)(IDS)
        except ValueError as error:
            assert key != "architectures" and "\n" not in str(error), error
            refused += 1
            continue
        if (theirs := rebuilt(model, mutated)) is None:
            continue
        torch.testing.assert_close(
            ours[described], theirs, rtol=0, atol=2e-4, msg=lambda text, at=f"{key}={value}": f"{at}: {text}"
        )
        compared += 1
    assert compared > 20 and refused > 10


def mutations(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Other values of each key that decides something in transformers."""
    for key, value in config.items():
        if key in ("architectures", "model_type", "vocab_size", "num_hidden_layers", "rope_parameters"):
            continue  # they change the tensors, or have values of their own
        match value:
            case bool():
                yield key, not value
            case int():
                yield from ((key, other) for other in (0, 1, value + 1, value * 2))
            case float():
                yield from ((key, other) for other in (0.0, value * 100 + 0.5))
            case list() if key == "layer_types":
                yield key, ["full_attention", *["sliding_attention"] * (len(value) - 1)]
                yield key, ["sliding_attention", *["full_attention"] * (len(value) - 1)]
            case None:
                yield from ((key, other) for other in (1, 0.5, True))
            case _:
                pass
    yield from (("rope_parameters", rope) for rope in ROPES)
    yield from (
        ("partial_rotary_factor", 0.5),
        ("rope_theta", 77.0),
        ("head_dim", 4),
        ("original_max_position_embeddings", 8),
        ("mlp_only_layers", [1]),
        ("mlp_only_layers", [0]),
        ("full_attention_interval", 3),
    )


def rebuilt(model: nn.Module, config: dict[str, Any]) -> torch.Tensor | None:
    """The logits of transformers' model of this configuration with the weights of `model`; None if there is no such model."""
    try:
        changed = type(model.config).from_dict(copy.deepcopy(config))
        changed._attn_implementation = changed._experts_implementation = "eager"
        other = type(model)(changed).eval()
        other.load_state_dict(model.state_dict(), strict=True)
        return other(IDS).logits
    except Exception:
        return None
