"""`tokenyard plan cluster=...`: the layouts that fit, why others do not, and the experiment that the first becomes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tokenyard.launch.main import main
from tokenyard.parallel.config import OWN_EXCHANGES, Exchange, Recompute
from tokenyard.plan.candidates import candidates
from tokenyard.plan.gpu_cluster import read_cluster
from tokenyard.plan.rank_memory import rank_memory
from tokenyard.plan.search import Fit, Found, Goal, Planner
from tokenyard.plan.workload import RECOMPUTED
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.rules.rules import violations

WORDS = ["model=olmoe_1b_7b", "cluster=h100x8", "batch.tokens=524288"]


def configured(*words: str) -> Config:
    return compose(["model=olmoe_1b_7b", "precision=bf16", "sequence_length=4096", "batch.sequences=128", *words])


@pytest.fixture(scope="module")
def found() -> Found:
    config = configured("launch=torchrun", "launch.ranks=8")
    return Planner(config, read_cluster("h100x8")).search(Goal.fastest, {})


def test_every_candidate_is_legal_and_new() -> None:
    """By all rules of the configuration, of which the search checks those about layouts."""
    config = configured("launch=torchrun", "launch.ranks=8", "launch.nodes=2")
    all_of_them = [each for group in candidates(config, 16, 8, {}) for each in group]
    assert len({str(each.parallel) + str(each.batch) for each in all_of_them}) == len(all_of_them) > 1000
    for each in all_of_them[::7]:
        assert next(violations(replace(config, parallel=each.parallel, batch=each.batch), 16), None) is None
    kinds = {(each.parallel.recompute, each.parallel.exchange) for each in all_of_them}
    assert {recompute for recompute, _ in kinds} == set(RECOMPUTED)
    assert {exchange for _, exchange in kinds} == set(OWN_EXCHANGES) - {Exchange.gather}


def test_fixed_settings_stay() -> None:
    config = configured("parallel.tensor=2", "launch=torchrun", "launch.ranks=8")
    groups = list(candidates(config, 8, 8, {"tensor": 2, "recompute": Recompute.block}))
    assert groups
    assert all(each.parallel.tensor == 2 and each.parallel.recompute is Recompute.block for group in groups for each in group)


def test_the_best_are_in_order_and_fit(found: Found) -> None:
    times = [each.time.likely for each in found.best]
    assert len(times) == 10
    assert times == sorted(times)
    for each in found.best:
        assert each.memory.peak <= each.usable
        assert each.verdict is (Fit.tight if each.memory.peak > 0.9 * each.usable else Fit.fits)
        config = configured(*each.candidate.overrides(), "launch=torchrun", "launch.ranks=8")
        assert rank_memory(config, 8).peak == each.memory.peak


def test_no_faster_layout_fits(found: Found) -> None:
    """Of a sample: what is faster than the last of the table and not in it does not fit."""
    config, last = configured("launch=torchrun", "launch.ranks=8"), found.best[-1].time.likely
    planner, shown = Planner(config, read_cluster("h100x8")), {str(each.candidate) for each in found.best}
    faster = [
        planner.plan(best)
        for group in list(candidates(config, 8, 8, {}))[::9]
        if planner.time(best := min(group, key=lambda each: planner.time(each).likely)).likely < last and str(best) not in shown
    ]
    assert faster
    assert all(each.verdict is Fit.out for each in faster)


def test_what_would_make_a_layout_fit(found: Found) -> None:
    assert found.refused
    for each in found.refused:
        assert each.least.memory.peak > each.least.usable
        key, _, value = each.remedy.partition(":")[0].partition("=")
        if key.startswith("parallel."):
            changed = configured(*each.least.candidate.overrides(), f"{key}={value}", "launch=torchrun", "launch.ranks=8")
            assert rank_memory(changed, 8).peak <= each.least.usable


def test_fewer_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """The goal fits takes the fewest hosts that have room."""
    assert main(["plan", "model=mixtral_8x7b", "cluster=h200x32", "goal=fits", "--json", "parallel.recompute=block"]) == 0
    best = json.loads(capsys.readouterr().out)["best"]
    assert {each["ranks"] for each in best} == {8}


def test_table_explanation_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "tokens=1e11"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 120
    assert len(re.findall(r"FITS|TIGHT", table)) == 10
    assert main(["plan", *WORDS, "tokens=1e11", "--explain", "2"]) == 0
    explained = capsys.readouterr().out
    assert all(
        word in explained for word in ("products", "hide behind", "bytes a GPU sends", "memory", "MFU", "US dollars", "prices of")
    )
    assert main(["plan", *WORDS, "tokens=1e11", "--json", "--explain", "2"]) == 0
    plain = json.loads(capsys.readouterr().out)
    low, likely, high = plain["step_seconds"]
    assert low < likely < high
    shown = sum(plain["terms"].values()) - sum(plain["hidden"].values())
    assert shown == pytest.approx(likely, rel=1e-6)
    assert plain["days"][1] == pytest.approx(1e11 / 524288 * likely / 86400)
    assert plain["dollars"][0] == pytest.approx(8 * 24 * plain["days"][0] * plain["price"]["low"])
    assert sum(plain["memory"].values()) == pytest.approx(plain["memory_bytes"])


def test_an_experiment_that_train_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "tokens=1e9", "--write", "experiment=mine", "--config-dir", str(tmp_path)]) == 0
    assert "experiment=mine" in capsys.readouterr().out
    written = (tmp_path / "experiment" / "mine.yaml").read_text()
    config = compose(["experiment=mine", "--config-dir", str(tmp_path)])
    assert config.batch.sequences * config.sequence_length == 524288
    assert (config.launch.nodes, config.launch.ranks, config.steps) == (1, 8, round(1e9 / 524288))
    assert next(violations(config, 8), None) is None
    assert main(["train", "--layout-only", "--config-dir", str(tmp_path), "experiment=mine"]) == 0
    assert "8 ranks on 1 node" in capsys.readouterr().out
    assert main(["plan", *WORDS, "--write", "experiment=mine", "--config-dir", str(tmp_path)]) == 2
    assert "nearest valid: --write experiment=mine_2" in capsys.readouterr().err
    assert (tmp_path / "experiment" / "mine.yaml").read_text() == written


def test_the_experiment_is_what_was_planned(tmp_path: Path) -> None:
    """Also where it begins with another experiment, whose layout it replaces, and where settings were typed."""
    words = ["experiment=deepseek_v3_256_gpus", "model.layers=8", "model.mtp_depth=0", "seed=7", "cluster=h100x64", "goal=fits"]
    assert (
        main(["plan", *words, "batch.tokens=1048576", "tokens=1e9", "--write", "experiment=mine", "--config-dir", str(tmp_path)])
        == 0
    )
    config = compose(["experiment=mine", "--config-dir", str(tmp_path)])
    assert (config.model.layers, config.seed, config.model.attention.kind.value) == (8, 7, "mla")
    world = config.launch.nodes * config.launch.ranks
    assert (world, config.batch.sequences * config.sequence_length) == (16, 1048576), "the fewest that it fits"
    assert next(violations(config, world), None) is None and config.parallel.pipeline == 1, "theirs is 8"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=olmoe_1b_7b"], "cluster: says on which GPUs; nearest valid: cluster=h100x64"),
        (["cluster=h10x8"], "cluster=h10x8: must be TYPExNUMBER"),
        ([*WORDS, "goal=fast"], "goal=fast: must be one of fastest, cheapest, fits, loss; nearest valid: goal=fastest"),
        ([*WORDS, "tokens=-1"], "tokens=-1: must be a number above 0; nearest valid: tokens=1e9"),
        ([*WORDS, "hot=nan"], "hot=nan: must be a number above 0; nearest valid: hot=1"),
        ([*WORDS, "precision=fp32"], "precision=fp32: must be bf16"),
        ([*WORDS, "parallel.tensor=3"], "has no layout on h100x8 with tensor=3"),
        (["model=qwen3_next_80b_a3b", "cluster=h100x8"], "layers of gated DeltaNet"),
        (["model=mixtral_8x7b", "cluster=h100x8", "parallel.recompute=offload"], "parallel.recompute=offload: what it copies"),
        ([*WORDS, "parallel.recompute=block", "--explain", "99"], "--explain=99: must be at most the"),
        ([*WORDS, "--write", "mine"], "--write=mine: must be experiment=NAME; nearest valid: --write experiment=mine"),
        ([*WORDS, "--write", "experiment=a/b"], "must be a name of small letters"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
