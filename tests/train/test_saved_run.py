"""--from RUN_FOLDER: a run's config.yaml composes to what it was, and what the command line says on top of it wins."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.launch.main import main
from tokenyard.train.config.compose import compose, parse_arguments
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.config.schema import quoted
from tokenyard.train.config.serialize import plain_config, write_config
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run
from tokenyard.train.saved_run import with_run
from tokenyard.train.weight_source import compose_run


def saved(folder: Path, *words: str) -> Config:
    """Writes config.yaml of the run that `words` describe."""
    folder.mkdir(parents=True)
    config = compose_run(parse_arguments([*words, f"run.dir={quoted(str(folder))}"]))[0]
    write_config(config, folder / "config.yaml")
    return config


def again(folder: Path, *words: str) -> Config:
    return compose_run(with_run(parse_arguments([*words, "--from", str(folder)])))[0]


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        again(folder, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=tiny_deepseek_v3", "seed=3", "optimizer.epsilon=1e-12", "precision=fp32", "log.every=1"],
        ["experiment=fine_grained", "schedule=wsd", "schedule.decay=7", "numerics.spike_sigma=null"],
        ["debug=cpu", "launch=slurm", "launch.slurm.lines=['--a=b c','--d=\"e\\'s\"']"],
        ["engine=deepspeed", "engine.extra={zero_optimization:{overlap_comm:true,name:'a b'},list:[1,x]}"],
        ["data=text", "data.path='a, {b} \\\\ [c]=d'", "tokenizer=bytes", "sample.prompt='<html> \\'quoted\\' $x # no: comment'"],
        ["model.moe.experts=0", "model.dense_layers=[0,2]", "model.moe.capacity.schedule=[1,0.5,9,0]", "sample.prompt=''"],
    ],
    ids=lambda words: words[0] if words else "nothing",
)
def test_the_settings_come_back(words: list[str], tmp_path: Path) -> None:
    config = saved(tmp_path / "it's a run", *words)
    assert plain_config(again(tmp_path / "it's a run")) == plain_config(config)


def test_what_is_said_on_top_wins(tmp_path: Path) -> None:
    config = saved(tmp_path / "run", "experiment=fine_grained", "steps=7", "schedule=wsd", "schedule.final=0.5", "seed=4")
    found = again(tmp_path / "run", "steps=9", f"run.dir={tmp_path / 'other'}", "model.moe.top_k=3")
    assert (found.steps, found.seed, found.run.dir, found.model.moe.top_k) == (9, 4, str(tmp_path / "other"), 3)
    assert (found.model.moe.experts, found.schedule) == (config.model.moe.experts, config.schedule)


def test_an_option_of_a_group_replaces_its_section(tmp_path: Path) -> None:
    config = saved(tmp_path / "run", "model=tiny_mixtral", "model.norm_epsilon=1e-3", "schedule=wsd", "seed=4", "data=synthetic")
    found = again(tmp_path / "run", "model=tiny", "schedule=cosine")
    assert found.model == compose(["model=tiny"]).model and found.schedule == Config().schedule
    assert (found.seed, found.data, found.run.dir) == (4, config.data, str(tmp_path / "run"))
    eight = again(tmp_path / "run", "experiment=eight_gpus")
    changed = compose(["experiment=eight_gpus"])
    assert (eight.parallel, eight.batch, eight.model) == (changed.parallel, changed.batch, config.model)


def test_a_run_goes_on_from_its_own_checkpoints_wherever_its_folder_is(tmp_path: Path) -> None:
    saved(tmp_path / "run", "checkpoint.resume=never", "seed=4")
    (tmp_path / "run").rename(tmp_path / "moved")
    found = again(tmp_path / "moved")
    assert (found.checkpoint.resume, found.run.dir, found.seed) == ("auto", str(tmp_path / "moved"), 4)
    sweep = with_run(parse_arguments(["-m", "seed=1,2", "model=tiny,default", "--from", str(tmp_path / "moved")]))
    assert not any(text.startswith(("run.dir", "seed=4")) for text in sweep.overrides)


def test_settings_that_win_over_those_of_a_source_stay(tmp_path: Path) -> None:
    """0.01 is the default, which config.yaml does not tell from a value that was said."""
    words = ["steps=1", "sample.prompt=''", f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'source'}"]
    assert run(compose([*TINY_RUN, *words, "model.moe.balance.coefficient=0.5", "evaluate.sequences=4"])) == 0
    init = [f"checkpoint.init={tmp_path / 'source'}", "data=synthetic", "tokenizer=bytes"]
    config = saved(tmp_path / "run", *init, "model.moe.balance.coefficient=0.01")
    assert config.model.moe.balance.coefficient == 0.01
    assert plain_config(again(tmp_path / "run")) == plain_config(config)
    other = again(tmp_path / "run", f"checkpoint.init={tmp_path / 'source'}")
    assert other.model.moe.balance.coefficient == 0.5 and other.data == config.data


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "runs" / "one")
    rule = "must be the folder of a run, with its config.yaml; nearest valid: --from"
    assert refusal(tmp_path / "runs" / "on") == f"--from={tmp_path / 'runs' / 'on'}: {rule} {tmp_path / 'runs' / 'one'}"
    assert refusal(tmp_path / "runs") == f"--from={tmp_path / 'runs'}: {rule} {tmp_path / 'runs' / 'one'}"
    monkeypatch.setenv("MY_SERVICE_TOKEN", "very-secret-value")
    saved(tmp_path / "secret", "data=jsonl", "data.path=https://me:pass@example.org/very-secret-value.jsonl")
    said = refusal(tmp_path / "secret")
    assert said.startswith("data.path=https://<user>@example.org/<MY_SERVICE_TOKEN>.jsonl: is without its secrets in ")
    assert (
        again(tmp_path / "secret", "data.path=https://you:too@example.org/x.jsonl").data.path
        == "https://you:too@example.org/x.jsonl"
    )
    config = tmp_path / "runs" / "one" / "config.yaml"
    for text, says in {
        "a: [1,\nb: }": "while parsing",
        "a: &a [1]\nb: *a": "may have no aliases",
        "- 1": "must hold the configuration of a run",
        "steps: many": "steps=many: must be an integer",
        "stepps: 3": "stepps=3: there is no such setting",
        "sample: {prompt: '${oc.env:HOME}'}": "${oc.env:HOME}: a configuration that is read may not hold",
    }.items():
        config.write_text(text)
        assert refusal(config.parent).startswith(f"--from {config.parent}: {says}")


def test_the_line_that_is_printed_goes_on_bit_for_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY_RUN, "evaluate.sequences=4", "sample.prompt=''", "schedule=constant", f"data.cache={tmp_path / 'cache'}"]
    assert run(compose([*words, "steps=4", f"run.dir={tmp_path / 'straight'}"])) == 0
    assert run(compose([*words, "steps=2", f"run.dir={tmp_path / 'halves'}"])) == 0
    line = next(line.strip() for line in capsys.readouterr().out.splitlines() if f"--from {tmp_path / 'halves'}" in line)
    assert line == f"tokenyard train --from {tmp_path / 'halves'} steps=4"
    assert main(line.split()[1:]) == 0
    one, two = (read_whole(tmp_path / name / "checkpoints" / "step_00000004") for name in ("straight", "halves"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    more = ["launch=torchrun", "launch.ranks=2", "steps=5", "parallel.expert=2"]
    command = [sys.executable, "-m", "tokenyard", "train", "--from", str(tmp_path / "halves"), *more]
    assert subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0
    resumes = [event for event in read_journal(tmp_path / "halves" / "events.jsonl") if event["event"] == "resume"]
    assert [(event["step"], event["expert"]) for event in resumes] == [(2, 1), (4, 2)]


def test_a_decay_branches_off_the_stable_part_and_leaves_the_run_alone(tmp_path: Path) -> None:
    run_dir, branch = tmp_path / "run", tmp_path / "run_decay_4"
    words = [*TINY_RUN, "evaluate.sequences=4", "sample.prompt=''", "log.every=1", f"data.cache={tmp_path / 'cache'}"]
    stable = [*words, "schedule=wsd", "steps=7", "schedule.decay=2", "checkpoint.every=2", "checkpoint.keep=9"]
    assert run(compose([*stable, f"run.dir={run_dir}"])) == 0
    before = sorted(str(path) for path in run_dir.rglob("*"))
    assert main(["train", "--from", str(run_dir), "schedule.decay_from=4", "steps=6", "schedule.final=0"]) == 0
    assert sorted(str(path) for path in run_dir.rglob("*")) == before
    records = read_journal(branch / "metrics.jsonl")
    assert [(record["step"], record["lr"]) for record in records] == [(5, 0.5 * 5e-3), (6, 0.0)]
    whole = read_journal(run_dir / "metrics.jsonl")
    assert records[0]["loss"] == whole[4]["loss"], "the weights and the batch of step 5 are those of the run"
    assert main(["train", "--from", str(run_dir), "schedule.decay_from=4", "steps=6", "schedule.final=0"]) == 0  # it has ended
    assert again(run_dir, "schedule.decay_from=4").steps == 5


def test_what_cannot_branch_off(tmp_path: Path) -> None:
    saved(tmp_path / "cosine", "schedule=cosine")
    assert refusal(tmp_path / "cosine", "schedule.decay_from=60").startswith(
        f"schedule.decay_from=60: branches off a stable learning rate, and {tmp_path / 'cosine'} has schedule.shape=cosine"
    )
    folder = tmp_path / "wsd"
    saved(folder, "schedule=wsd", "steps=100", "schedule.warmup=10")
    (folder / "checkpoints" / "step_00000050").mkdir(parents=True)
    for step in (5, 90):
        rule = f"is in the warm-up or the decay of {folder}; nearest valid: a step of its stable part"
        assert refusal(folder, f"schedule.decay_from={step}") == f"schedule.decay_from={step}: {rule}"
    rule = f"is a step of which {folder} has no checkpoint; nearest valid: schedule.decay_from=50"
    assert refusal(folder, "schedule.decay_from=40") == f"schedule.decay_from=40: {rule}"
