"""Numbers of the experts worked by hand, token classes, alarms, the console's table, and what a probe must not touch."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_numbers import step_numbers
from tiny_run import TINY_RUN
from tokenyard.moe.config import ModelConfig, MoEConfig, RouterConfig, Selection
from tokenyard.moe.router import Router
from tokenyard.moe.router_metrics import SUMS
from tokenyard.moe.token_info import TokenInfo
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.console.step_line import layer_lines
from tokenyard.train.logging.console.text import BLOCKS, plain
from tokenyard.train.logging.expert_stats.alerts import Alerts, experts_in_use
from tokenyard.train.logging.expert_stats.heatmap import load_map, png
from tokenyard.train.logging.expert_stats.routing_probe import movement, piece_text, token_class
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.metrics import brief_metrics, layer_metrics
from tokenyard.train.run import run
from tokenyard.train.step import StepNumbers

MODEL = ModelConfig(layers=4, moe_every=2, moe=MoEConfig(experts=4))
"""Layers 1 and 3 have experts."""
PEAKS = torch.tensor([[3.0, 30.0], [4.0, 18.0]]).double()
DEAD = torch.tensor([[False] * 4, [True, True, False, False]])


def step(**changes: Any) -> StepNumbers:
    counts = torch.tensor([[10, 10, 10, 10], [25, 5, 10, 0]])
    router_metrics = torch.tensor([[20.0, 20.0, 10.0, 40.0, 40.0], [20.0, 10.0, 16.0, 20.0, 30.0]]).double()
    return step_numbers(counts, dropped_L=torch.tensor([0, 10]), router_metrics_LG=router_metrics)._replace(**changes)


def metrics(numbers: StepNumbers, **extra: torch.Tensor) -> dict[str, float]:
    """The keys of a step of two ranks."""
    return brief_metrics(numbers, {"peaks_LP": PEAKS, "dead_LE": DEAD, **extra}, MODEL, 2)


def test_every_number_by_hand():
    assert SUMS == ("tokens", "entropy", "top1", "logit_norm", "rows")
    second = -(25 * math.log(25 / 40) + 5 * math.log(5 / 40) + 10 * math.log(10 / 40)) / 40 / math.log(4)
    variation = math.sqrt((15**2 + 5**2 + 10**2) / 4) / 10
    assert metrics(step(), bias_LE=torch.tensor([[0.0, 0.5], [-0.25, 0.5]])) == pytest.approx(
        {
            "moe/load_cv": variation,
            "moe/load_cv_layer": 3,
            "moe/load_cv_mean": variation / 2,
            "moe/load_entropy": second,
            "moe/load_entropy_layer": 3,
            "moe/load_entropy_mean": (1 + second) / 2,
            "moe/dead_fraction": 2 / 8,
            "moe/dropped_fraction": 10 / 40,
            "moe/dropped_fraction_layer": 3,
            "moe/router_entropy": 0.5,
            "moe/router_entropy_layer": 3,
            "moe/router_entropy_mean": 0.75,
            "moe/top1_probability": (0.5 + 0.8) / 2,
            "moe/router_logit_norm": (2 + 1) / 2,
            "moe/router_logit_max": 4.0,
            "moe/rank_overload": 30 / 20,
            "moe/exchange_skew": (30 + 18) / (20 + 15),
            "moe/expert_bias_range": 0.75,
        }
    )
    dense = step(counts_LE=torch.zeros(0, 4))
    assert metrics(dense) == {} == layer_metrics(dense, MODEL)
    assert layer_metrics(step(), MODEL)["moe/dropped/layer_3"] == 10


def test_a_step_without_tokens_divides_by_nothing():
    nothing = step(
        counts_LE=torch.zeros(2, 4).long(), router_metrics_LG=torch.zeros(2, 5).double(), dropped_L=torch.zeros(2).long()
    )
    found = metrics(nothing, peaks_LP=torch.zeros(2, 2).double())
    assert all(math.isfinite(value) for value in found.values())
    assert (found["moe/load_entropy"], found["moe/load_cv"], found["moe/rank_overload"]) == (1.0, 0.0, 1.0)


def test_router_metrics_leave_out_padding_and_come_in_training_only():
    router = Router(6, MoEConfig(experts=4, top_k=2), torch.float64)
    torch.nn.init.normal_(router.weight)
    x_BSD, valid_BS = torch.randn(2, 5, 6).double(), torch.rand(2, 5) < 0.6
    assert router(x_BSD, TokenInfo(valid_BS)).stats.router_metrics is None
    router.collects_metrics = True
    router_metrics = router(x_BSD, TokenInfo(valid_BS)).stats.router_metrics
    logits_TE = x_BSD[valid_BS] @ router.weight.detach().T
    p_TE = logits_TE.softmax(-1)
    assert router_metrics.tokens == valid_BS.sum() and not router_metrics.entropy.requires_grad
    torch.testing.assert_close(router_metrics.entropy, -(p_TE * p_TE.log()).sum())
    torch.testing.assert_close(router_metrics.top1, p_TE.amax(1).sum())
    torch.testing.assert_close(router_metrics.logit_norm, logits_TE.norm(dim=1).sum())
    assert router_metrics.logit_max == logits_TE.abs().max()
    assert router.eval()(x_BSD, TokenInfo(valid_BS)).stats.router_metrics is None


def test_hash_routing_has_no_logits():
    router = Router(6, MoEConfig(experts=4, top_k=2, router=RouterConfig(selection=Selection.hash)), torch.float32)
    router.collects_metrics = True
    router_metrics = router(torch.randn(1, 3, 6), TokenInfo(ids_BS=torch.arange(3).view(1, 3))).stats.router_metrics
    assert router_metrics.entropy.item() == pytest.approx(3 * math.log(2)) and router_metrics.logit_max == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" self", "identifier"),
        ("été", "identifier"),
        ("_x9", "identifier"),
        ("def", "keyword"),
        (" return ", "keyword"),
        (" 12", "number"),
        (".5", "number"),
        ("0x1F", "number"),
        (' "', "string"),
        ("'abc", "string"),
        ("):", "operator"),
        (" ==", "operator"),
        (" \n\t", "whitespace"),
        ("# note", "comment"),
        ("//", "comment"),
        ("--", "comment"),
        ("-", "operator"),
        ("�", "other"),
        ("♥", "other"),
    ],
)
def test_classes_of_tokens(text: str, kind: str):
    assert token_class(text) == kind


def test_marks_and_dropped_blanks_are_told_apart():
    pieces = {1: "", 2: " ", 3: "def"}

    def drops_the_first_blank(ids: list[int]) -> str:
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert piece_text(drops_the_first_blank, 1) == ("", True)
    assert piece_text(drops_the_first_blank, 2) == (" ", False)
    assert token_class("", mark=True) == "other"


def test_movement_between_probes():
    sums = torch.tensor([[10.0, 4.0], [5.0, 0.0], [20.0, 8.0], [15.0, 8.0]])
    assert movement(sums) == {"stability_L": [0.5, 0.0], "saturation_L": [0.75, 1.0]}


def test_alarms_are_told_once_until_it_is_over():
    alerts, even, one = Alerts(top_k=2), [[25] * 8, [25] * 8], [[25] * 8, [100, 96, 4, 0, 0, 0, 0, 0]]
    alive, dead = [[0] * 8, [0] * 8], [[0] * 8, [0] * 3 + [1] * 5]

    def heard(counts: list[list[int]], dead: list[list[int]]) -> list[str]:
        return [kind for kind, _ in alerts.check({"layers": [0, 5], "counts_LE": counts, "dead_LE": dead})]

    assert heard(even, alive) == []
    assert heard(one, alive) == ["collapse"]
    found = list(alerts.check({"layers": [0, 5], "counts_LE": one, "dead_LE": dead}))
    assert [kind for kind, _ in found] == ["dead_experts"]
    assert found[0][1].startswith("5 experts get no tokens any more: 3 of layer 5, 4 of layer 5, ")
    assert heard(one, dead) == []
    assert heard(even, alive) == []
    (text,) = [text for kind, text in alerts.check({"layers": [0, 5], "counts_LE": one, "dead_LE": alive}) if kind == "collapse"]
    assert text == "layer 5 uses only about 2.2 of its 8 experts"
    assert experts_in_use(np.array([[50.0, 50, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])).tolist() == pytest.approx([2.0, 4.0, 4.0])


def test_the_table_of_the_layers():
    record = {"step": 50, "steps": 25, "layers": [1, 3], "counts_LE": [[10, 10, 10, 10], [25, 5, 10, 0]], "dropped_L": [0, 10]}
    record["router_entropy_L"] = [1.25, 0.5]
    assert "\n".join(map(plain, layer_lines(record, BLOCKS))) == (
        "  layers over 25 steps to step 50\n"
        "  layer  load  most  expert  least   drop  entropy\n"
        "      1  ▄▄▄▄  1.00       0   1.00   0.0%    1.250\n"
        "      3  █▂▄_  2.50       0   0.00  25.0%    0.500"
    )
    many = {**record, "layers": list(range(40)), "counts_LE": [[1, 1]] * 39 + [[2, 0]], "dropped_L": [0] * 40}
    lines = [plain(line) for line in layer_lines({**many, "router_entropy_L": [0.0] * 40})]
    assert len(lines) == 18 and "the 16 least balanced of 40" in lines[0] and lines[-1].strip().startswith("39 ")


def test_heat_maps_are_pictures():
    from io import BytesIO

    from PIL import Image

    rgb = load_map([[2, 0], [1, 1]])
    assert rgb.shape == (24, 24, 3) and tuple(rgb[0, 0]) == (253, 231, 37) and tuple(rgb[23, 23]) == (34, 160, 132)
    assert np.array_equal(np.array(Image.open(BytesIO(png(rgb)))), rgb)
    assert load_map([[1] * 4000]).shape[1] == 4000


@pytest.mark.parametrize("experts", [8, 512])
def test_a_brief_record_has_at_most_25_keys_of_experts(tmp_path: Path, experts: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))
    everything = ["model.moe.router.null_experts=2", "model.moe.capacity.factor=1.5", "model.moe.balance.bias_rate=0.01"]
    sizes = [
        "steps=2",
        "telemetry.window=2",
        f"model.moe.experts={experts}",
        "evaluate.sequences=4",
        "sample.tokens=0",
        f"run.dir={tmp_path / 'run'}",
    ]
    assert run(compose([*TINY_RUN, *everything, *sizes])) == 0
    for record in read_journal(tmp_path / "run" / "metrics.jsonl"):
        assert len([key for key in record if key.startswith("moe/")]) == 25
    (last,) = read_journal(tmp_path / "run" / "telemetry.jsonl")
    assert {"step", "layers", "counts_LE", "dropped_L", "router_entropy_L", "top1_L", "bias_LE", "grad_norm_LE", "classes"} <= set(
        last
    )
    counts_LE = np.array(last["counts_LE"])
    assert counts_LE.shape == (2, experts)
    alerts = [event for event in read_journal(tmp_path / "run" / "events.jsonl") if event["event"] == "alert"]
    dead = (counts_LE == 0).sum()
    assert last["dead_LE"] == (counts_LE == 0).tolist()
    assert [event["alert"] for event in alerts] == (["dead_experts"] if dead else [])
    assert all(event["text"].startswith(f"{dead} experts") for event in alerts)
    counts_LE = np.array(list(last["classes"].values())).sum(0)
    assert list(last["coactivation"]) == [str(layer) for layer in last["layers"]][: 2 if experts < 512 else 1]
    for layer, pairs_EE in last["coactivation"].items():
        counts_E = counts_LE[last["layers"].index(int(layer))]
        assert np.array_equal(pairs_EE, np.transpose(pairs_EE)) and np.array_equal(np.diag(pairs_EE), counts_E)
