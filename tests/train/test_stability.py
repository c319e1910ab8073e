"""Norms and updates by kind against the weights before and after a step; attention logits against the whole product."""

import math
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.moe.attention import attention_mask, keep_largest_logits
from tokenyard.moe.softmax import Softmax
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.stability import KINDS, StabilityStats, kind_of_weight, stability_metrics
from tokenyard.train.run import run, single_step
from tokenyard.train.setup import open_session

CPU = torch.device("cpu")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("new", "seen"), [(600, 600), (1, 40), (300, 700)])
def test_the_largest_logit_is_that_of_the_whole_product(new: int, seen: int, window: int | None, documents: bool) -> None:
    torch.manual_seed(new)
    q_BHSh, k_BGTh = torch.randn(2, 6, new, 8, dtype=torch.float64), torch.randn(2, 3, seen, 8, dtype=torch.float64)
    documents_BS = torch.arange(seen).div(90, rounding_mode="floor").expand(2, -1) if documents else None
    mask = attention_mask(new, seen, window, CPU, documents_BS)
    logits_BHST = 0.3 * q_BHSh @ k_BGTh.repeat_interleave(2, dim=1).transpose(-1, -2)
    expected_H = logits_BHST.masked_fill(~mask, -math.inf).amax((0, 2, 3))
    found_H = torch.full((6,), -math.inf, dtype=torch.float64)
    softmax = Softmax(0.3, None, window, found_H)
    for row in range(2):
        rows = None if documents_BS is None else documents_BS[row : row + 1]
        keep_largest_logits(found_H, q_BHSh[row : row + 1], k_BGTh[row : row + 1], softmax, rows)
    torch.testing.assert_close(found_H, expected_H, rtol=1e-13, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_and_ratios_are_those_of_the_weights_before_and_after(optimizer: str, tmp_path: Path) -> None:
    words = [
        f"run.dir={tmp_path}/run",
        f"data.cache={tmp_path}/cache",
        "precision=fp64",
        "model=tiny_deepseek_v3",
        f"optimizer={optimizer}",
    ]
    session = open_session(compose([*TINY_RUN, *words, "optimizer.clip_norm=0.1", "steps=5"]), CPU)
    model = session.parallel.model
    stats = StabilityStats(session)
    for _ in range(3):
        stats.begin_step(watches=True)
        before = deepcopy(dict(model.named_parameters()))
        numbers = single_step(session)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    found = stability_metrics(stats.tensors(scale := 0.1 / (numbers.gradient_norm + 1e-6)), session.config.model)
    kinds = {kind_of_weight(name) for name in before}
    assert kinds == {kind for kind in KINDS if f"stability/weight_norm/{kind}" in found} == set(KINDS)
    for kind in kinds:
        names = [name for name in before if kind_of_weight(name) == kind]
        after = torch.cat([parameter.detach().flatten() for name, parameter in model.named_parameters() if name in names])
        update = after - torch.cat([before[name].detach().flatten() for name in names])
        expected = (
            after.norm(),
            torch.cat([gradients[name].flatten() for name in names]).norm() / scale,
            update.norm() / after.norm(),
        )
        for key, value in zip(("weight_norm", "grad_norm", "update_ratio"), expected, strict=True):
            assert found[f"stability/{key}/{kind}"] == pytest.approx(value.item(), rel=1e-9), (key, kind)
    session.close()


def test_a_detailed_run_logs_them_with_each_record_and_trains_as_without(tmp_path: Path) -> None:
    words = [*TINY_RUN, "steps=4", "telemetry.every=2", "log.every=1", "evaluate.every=0", f"data.cache={tmp_path}/cache"]
    for tier in ("brief", "detailed"):
        assert run(compose([*words, f"telemetry.tier={tier}", f"run.dir={tmp_path}/{tier}"])) == 0
    brief, detailed = (read_journal(tmp_path / tier / "metrics.jsonl") for tier in ("brief", "detailed"))
    assert [record["loss"] for record in brief] == [record["loss"] for record in detailed]
    keys = [{key for key in record if key.startswith("stability/")} for record in detailed]
    assert keys[0] == keys[2] == set() and "stability/attention_logit_max" in keys[1] == keys[3]
    assert not any(key.startswith("stability/") for record in brief for key in record)
    largest_AH = read_journal(tmp_path / "detailed" / "telemetry.jsonl")[0]["attention_logit_AH"]
    assert detailed[1]["stability/attention_logit_max"] == pytest.approx(max(map(max, largest_AH)), rel=1e-5)
    assert max(map(max, largest_AH)) > min(map(min, largest_AH))
    assert detailed[1]["stability/attention_logit_max_layer"] == max(range(2), key=lambda layer: max(largest_AH[layer]))
