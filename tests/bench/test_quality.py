"""Equal active parameters, where curves cross, what is run and what is not run again."""

import json
import math
from pathlib import Path
from statistics import fmean

import pytest
from forked_runs import forked
from tiny_run import TINY_RUN
from tokenyard.bench.quality.__main__ import laboratory, main, parse
from tokenyard.bench.quality.plan import BOUND, DENSE, FP8, MUON, SIZES, TUNED, QualityPlan, TrainingRun, active, models, variants
from tokenyard.bench.quality.runs import Lab, complete, crossing, deviation
from tokenyard.moe.config import Products
from tokenyard.moe.param_count import count


@pytest.mark.parametrize("size", SIZES)
def test_a_token_passes_as_many_parameters_in_every_variant(size: str):
    found = models(SIZES[size], variants(SIZES[size]))
    dense = active(found[DENSE])
    assert {name for name, model in found.items() if model.products is not Products.wide} == set(FP8)
    assert {name for name, model in found.items() if abs(active(model) / dense - 1) > BOUND} == set()
    held = {count(model).experts for name, model in found.items() if name != DENSE}
    assert len(held) == 1, "all variants hold as many weights of routed experts"


def test_unequal_active_parameters_are_refused():
    size = SIZES["cpu"]
    wider = {**variants(size), TUNED: ["model.moe.experts=16", "model.moe.hidden=160"]}
    with pytest.raises(ValueError, match=r"^top-2: 149,824 active parameters, \+18\.7%, must be within 2% of the dense"):
        models(size, wider)


def test_crossing_is_linear_in_the_logarithm_of_the_tokens():
    tokens, losses = [1e3, 1e4, 1e5], [5.0, 4.0, 3.5]
    assert crossing(tokens, losses, 4.5) == pytest.approx(math.sqrt(1e3 * 1e4))
    assert crossing(tokens, losses, 4.0) == pytest.approx(1e4)
    assert crossing(tokens, losses, 3.75) == pytest.approx(math.sqrt(1e4 * 1e5))
    assert crossing(tokens, losses, 6.0) == 1e3
    assert crossing(tokens, losses, 3.4) is None


def test_crossing_is_the_first_one():
    assert crossing([1, 2, 4, 8], [5.0, 4.0, 4.6, 3.9], 4.0) == pytest.approx(2)


def test_half_the_tokens_for_a_curve_twice_as_fast():
    tokens = [2**power for power in range(10, 21)]
    dense = [10 * n**-0.1 for n in tokens]
    assert crossing(tokens, [10 * (2 * n) ** -0.1 for n in tokens], dense[-1]) == pytest.approx(tokens[-1] / 2)


def test_deviation_is_that_of_a_sample():
    assert fmean([1.0, 2.0, 3.0]) == 2 and deviation([1.0, 2.0, 3.0]) == 1 and deviation([4.0]) == 0


def test_the_best_rate_of_each_kind_and_a_seed_after_the_other():
    plan = QualityPlan(100, 2, [0.5], {DENSE: [[1e-3, 4.0], [2e-3, 3.9]], TUNED: [[1e-3, 3.8], [2e-3, 3.9]]})
    runs = plan.runs([DENSE, TUNED, "bias"])
    assert runs[:4] == [
        TrainingRun(DENSE, 2e-3, 100, 1),
        TrainingRun(TUNED, 1e-3, 100, 1),
        TrainingRun("bias", 1e-3, 100, 1),
        TrainingRun(TUNED, 1e-3, 50, 1),
    ]
    assert [run._replace(seed=1) for run in runs[4:]] == runs[:4]
    plan.tried[MUON] = [[4e-3, 3.7]]
    assert [run.rate for run in plan.runs([DENSE, TUNED, MUON])[:5]] == [2e-3, 1e-3, 4e-3, 1e-3, 4e-3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture
def words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Six steps of the dense model, top-2 and two more variants, with one seed."""
    monkeypatch.setenv("TOKENYARD_CACHE", str(folder / "cache"))
    words = ["--variants", "expert-choice", "fp8-exchange", MUON, "--seeds", "1", "--steps", "6"]
    words += ["--rates", "1e-2", "--shorter", "--rounds", "1"]
    # Narrower than this the router is too large a part.
    tiny = ["model.width=64" if word.startswith("model.width") else word for word in TINY_RUN if "moe.hidden" not in word]
    return [*tiny, "evaluate.sequences=8", *words, "--out", str(folder / "out")]


def test_runs_and_results(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The dense run is started as users' runs are; the others, which differ in settings alone, are forked from one process."""
    start = Lab.start

    def started(lab: Lab, run: TrainingRun) -> int:
        if run.variant == DENSE:
            return start(lab, run)
        place = lab.place(run)
        return forked(1, [*lab.settings(run), f"run.dir={place}"], place / "output.txt").codes[0]

    monkeypatch.setattr(Lab, "start", started)
    assert main(words) == 0
    assert capsys.readouterr().out.count("quality: dense-rate") == 1
    found = json.loads((folder / "out" / "results-6.json").read_text())
    dense, top_2 = found["variants"][DENSE], found["variants"][TUNED]
    assert dense["cost"] == dense["flops"] == 1 and dense["shares"] == [pytest.approx(1)] and dense["below_dense"] == [0]
    assert top_2["cost"] > 0 and top_2["flops"] == pytest.approx(1, abs=BOUND) and top_2["imbalance"] > 1
    assert top_2["losses"] != dense["losses"] and found["shorter"]["1"]["losses"] == top_2["losses"]
    (above,), narrow = found["variants"]["fp8-exchange"]["above_tuned"], found["variants"]["fp8-exchange"]["losses"]
    assert 0 < abs(above) < 0.1 and above == narrow[0] - top_2["losses"][0]
    muon = found["variants"][MUON]["losses"]
    assert muon != top_2["losses"] and found["muon"]["shorter"]["1"]["losses"] == muon
    assert len(found["causal"]) == 1 and found["causal"] != found["variants"]["expert-choice"]["losses"]
    assert (folder / "out" / "quality-6.png").stat().st_size > 10_000


def test_what_is_complete_is_not_run_again(words: list[str], monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(Lab, "start", lambda lab, run: started.append(run.variant) or 0)
    assert main([*words, "--stages", "train"]) == 0 and not started
    lab = laboratory(parse(words))
    (lab.place(TrainingRun(TUNED, 1e-2, 6, 1)) / "events.jsonl").unlink()
    with pytest.raises(RuntimeError, match="ended before its last step with exit code 0"):
        main([*words, "--stages", "train"])
    assert started == [TUNED]


def test_a_folder_of_other_settings_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main([*words, "model.init_std=0.5", "--stages", "train"]) == 2
    assert "was run with other settings (model.init_std=0.5); take another folder" in capsys.readouterr().err


def test_a_run_that_fails_is_named(words: list[str], folder: Path):
    lab = laboratory(parse([*words, "data=text", "data.path=/nowhere", "--out", str(folder / "fails")]))
    run = TrainingRun(DENSE, 1e-2, 6, 1)
    with pytest.raises(
        RuntimeError,
        match=r"^dense-rate0.01-steps6-seed1 ended before its last step with exit code 2; its output is in .*output.txt$",
    ):
        lab.train([run])
    assert not complete(lab.place(run))


def test_an_unknown_variant_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["--variants", "top-3"]) == 2
    assert "--variants top-3: must be among dense, top-1, top-2" in capsys.readouterr().err
