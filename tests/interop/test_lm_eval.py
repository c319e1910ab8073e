"""lm-eval through our adapter gives what its own adapter of transformers gives; during a run it changes nothing of the training.

Needs lm-eval, an extra: pip install 'tokenyard[lm-eval]'.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from init_runs import configured, trained
from tokenizer_cases import saved_tokenizer
from tokenyard.checkpoint.store import read_whole
from tokenyard.data.config import TokenizerConfig, TokenizerKind
from tokenyard.data.tokenizer import ready_tokenizer
from tokenyard.interop.export import export_checkpoint
from tokenyard.launch.main import main
from tokenyard.train.config.config import ConfigError
from tokenyard.train.downstream.tasks import _adapter, open_tasks, run_tasks
from tokenyard.train.load import open_for_scoring
from tokenyard.train.logging.journal import read_journal

pytest.importorskip("lm_eval", reason="the comparison needs lm-eval (pip install 'tokenyard[lm-eval]')")
TEXTS = ["Ada has 3 red apples. ", "", "def f(x):\n    return x", "na\u00efve \u4f60\u597d "]
PAIRS = [(context, continuation) for context in TEXTS for continuation in (" Ben", "finds 4 goats", "\n\n")]
LONG = [(" ".join(f"word{index}" for index in range(60)), " and more")]
QUESTIONS = [
    {"question": f"{a} plus {b} is", "options": [str(a + b), str(a + b + 1), str(a)], "right": 0} for a in range(4) for b in (1, 7)
]
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: data.jsonl}}
test_split: train
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""


def tasks_in(folder: Path) -> Path:
    """Writes tasks of each kind of request, and their data."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    question, choices = "{{question}}", 'doc_to_choice: "{{options}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
    until = 'generation_kwargs: {until: ["7", "."], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]'
    rolling = "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]"
    for name, kind, text, target, more in (
        ("sums", "multiple_choice", question, "{{right}}", choices),
        ("writes", "generate_until", question, "{{options[0]}}", until),
        ("rolls", "loglikelihood_rolling", "", question, rolling),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, text=text, target=target, more=more))
    return folder


@pytest.fixture(params=["run of bytes", "gpt2", "llama3", "mixtral"])
def folder(request: pytest.FixtureRequest, saved: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of Hugging Face: an exported run, or a model with a tokenizer that has a begin of documents, or none."""
    if request.param == "run of bytes":
        trained(configured(saved("Mixtral", vocab_size=259, num_local_experts=4), tmp_path / "run"))
        export_checkpoint(tmp_path / "run", tmp_path / "back")
        return tmp_path / "back"
    path = saved_tokenizer(request.param, tmp_path / "tokenizer")
    tokenizer = ready_tokenizer(TokenizerConfig(TokenizerKind.huggingface, str(path)))
    assert tokenizer is not None
    found = saved("Mixtral", vocab_size=tokenizer.size, num_local_experts=4, eos_token_id=tokenizer.end_of_document)
    saved_tokenizer(request.param, found)
    return found


def test_scores_are_those_of_transformers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scorer = open_for_scoring(str(folder), 4)
    scorer.length = 32
    ours = _adapter()(scorer)
    theirs = HFLM(pretrained=str(folder), dtype="float32", batch_size=4, max_length=32, device="cpu")
    requests = [SimpleNamespace(args=pair) for pair in [*PAIRS, *LONG]]
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [likelihood for likelihood, _ in found] == pytest.approx([likelihood for likelihood, _ in expected], abs=1e-4, rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [SimpleNamespace(args=(text,)) for text in [*(text for text in TEXTS if text), LONG[0][0]]]
    rolling = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolling, abs=1e-4, rel=1e-5)
    settings = {"until": ["\n", "a"], "max_gen_toks": 8, "do_sample": False}
    asked = [SimpleNamespace(args=(context, settings)) for context, _ in [*PAIRS[3:], *LONG] if context]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    tasks = open_tasks([str(tasks_in(tmp_path / "tasks"))])
    by_us = run_tasks(tasks, scorer)
    results = evaluate(theirs, open_tasks([str(tmp_path / "tasks")]), bootstrap_iters=0, log_samples=False)["results"]
    assert set(by_us) == {
        *("sums/acc", "sums/acc_norm", "writes/exact_match", "rolls/bits_per_byte", "rolls/word_perplexity"),
    }
    for name, value in by_us.items():
        task, metric = name.split("/")
        assert value == pytest.approx(results[task][f"{metric},none"], rel=1e-5), name


def test_tasks_during_a_run(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With probes and samples too, the training is bit for bit the same, and the last results are those of the checkpoint."""
    tasks = tasks_in(tmp_path / "tasks")
    source = saved("Mixtral", vocab_size=264, num_local_experts=4)
    common = ["sequence_length=64", "model.dropout=0.1", "steps=4", "evaluate.every=2"]
    trained(configured(source, tmp_path / "plain", *common))
    watched = [f"evaluate.tasks=[{tasks}]", "evaluate.tasks_every=1", "evaluate.tasks_limit=4", "evaluate.probes=3"]
    trained(configured(source, tmp_path / "run", *common, *watched, "sample.every=3", "sample.prompts=[Ada]", "sample.tokens=3"))
    records = [read_journal(tmp_path / name / "metrics.jsonl") for name in ("plain", "run")]
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in records[0]] == [record[name] for record in records[1]]
    weights = [read_whole(tmp_path / name / "checkpoints" / "step_00000004") for name in ("plain", "run")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert all("tasks/sums/acc" in record for record in records[1]) and len(records[1]) == 4
    assert {"probes/copying", "probes/copying_chance", "validation/bits_per_byte"} <= set(records[1][-1])
    samples = [event for event in read_journal(tmp_path / "run" / "events.jsonl") if event["event"] == "sample"]
    assert [(event["step"], event["prompt"]) for event in samples] == [(3, "Ada")]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--tasks", str(tasks), "--limit", "4"]) == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert said == {key[6:]: f"{value:.4f}" for key, value in records[1][-1].items() if key.startswith("tasks/")}


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tasks_in(tmp_path / "tasks")
    (tasks / "data.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    for name, words in (
        (str(tasks / "sums.yaml"), "cannot be loaded"),
        (str(tmp_path / "none.yaml"), "there is no such file"),
        (str(tmp_path / "empty"), "has no YAML file of a task"),
    ):
        with pytest.raises(ConfigError, match=words) as refusal:
            open_tasks([name])
        assert len(str(refusal.value).splitlines()) == 1
    assert main(["evaluate", str(tmp_path), "--tasks", "a", "evaluate.sequences=2"]) == 2
    capsys.readouterr()
