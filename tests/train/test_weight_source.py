"""checkpoint.init: model and tokenizer come from the source, settings win where they fit its weights, and are refused elsewhere."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole, save_checkpoint
from tokenyard.data.config import TokenizerKind
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.config.compose import parse_arguments
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.config.serialize import plain_config
from tokenyard.train.preflight import check_config
from tokenyard.train.run import run
from tokenyard.train.weight_source import compose_run

DATA = ["data=synthetic", "tracker=jsonl"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a model that differs from the default one in shape and in training: to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    model = ["model.moe.experts=4", "model.moe.balance.bias_rate=0.01", "model.moe.capacity.factor=1.5", "model.norm_epsilon=1e-6"]
    words = [*TINY_RUN, *model, "steps=1", "evaluate.sequences=4", "sample.prompt=''", f"run.dir={folder}"]
    config = composed(*words, f"data.cache={folder.parent / 'cache'}")
    assert run(config) == 0
    return folder


def composed(*words: str) -> Config:
    return compose_run(parse_arguments(list(words)))[0]


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(composed(*DATA, *words), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_and_tokenizer_are_those_of_the_source(source: Path) -> None:
    config = composed(*DATA, f"checkpoint.init={source}")
    assert (config.model.width, config.model.moe.experts, config.model.moe.capacity.factor) == (32, 4, 1.5)
    assert config.model.norm_epsilon == 1e-6 and config.tokenizer.kind is TokenizerKind.bytes
    assert (config.steps, config.sequence_length, config.batch.sequences, config.checkpoint.resume) == (1150, 128, 16, "auto")
    check_config(config, 1)


def test_what_is_set_on_top_wins(source: Path) -> None:
    words = ["model.moe.balance.coefficient=0.5", "model.moe.capacity.factor=null", "model.moe.top_k=1", "tokenizer=sentencepiece"]
    config = composed(*DATA, f"checkpoint.init={source}", *words)
    moe = config.model.moe
    assert (moe.balance.coefficient, moe.capacity.factor, moe.top_k, moe.experts) == (0.5, None, 1, 4)
    assert config.tokenizer.kind is TokenizerKind.sentencepiece and config.model.norm_epsilon == 1e-6


def test_a_model_of_an_experiment_gives_way(source: Path) -> None:
    config = composed(*DATA, "experiment=fine_grained", f"checkpoint.init={source}")
    assert (config.model.moe.experts, config.model.width) == (4, 32)


def test_dropout_of_an_experiment_stays(source: Path) -> None:
    """The source was trained without. It is of the run like its rate, and needs no weights."""
    words = ["experiment=switch_base_8_fine_tuning", f"checkpoint.init={source}", "optimizer.lr=1e-3"]
    config = composed(*DATA, *words)
    assert (config.model.dropout, config.model.moe.dropout, config.model.width) == (0.1, 0.4, 32)
    check_config(config, 1)
    config = composed(*DATA, *words, "model.moe.dropout=0")
    assert (config.model.dropout, config.model.moe.dropout) == (0.1, 0.0)
    assert composed(*DATA, f"checkpoint.init={source}", "model.dropout=0.3").model.dropout == 0.3


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "model.moe.experts=8",
            "model.moe.experts=8: does not fit the weights of checkpoint.init=X; nearest valid: model.moe.experts=4",
        ),
        ("model.layers=3", "model.layers=3: does not fit the weights of checkpoint.init=X; nearest valid: model.layers=2"),
        ("model.attention.sinks=true", "model.attention.sinks=true: does not fit the weights of checkpoint.init=X; "),
        ("model.moe.balance.bias_rate=0", "bias_rate=0.0: the router has expert biases in the weights of checkpoint.init=X; "),
        ("model=tiny", "model=tiny: the model is that of checkpoint.init=X; "),
        ("checkpoint.resume=X", "checkpoint.init=RUN: a run that resumes from checkpoint.resume=X has its weights from there; "),
    ],
)
def test_what_does_not_fit_is_refused(word: str, expected: str, source: Path) -> None:
    step = str(source / "checkpoints" / "step_00000001")
    said = refusal(f"checkpoint.init={source}", word.replace("X", step))
    assert expected.replace("X", step).replace("RUN", str(source)) in said and "nearest valid: " in said


def test_a_path_that_is_no_source_is_refused_with_the_nearest(source: Path, tmp_path: Path) -> None:
    assert refusal(f"checkpoint.init={source.parent / 'frist'}") == (
        f"checkpoint.init={source.parent / 'frist'}: must exist; nearest valid: checkpoint.init={source}"
    )
    rule = "must be a checkpoint, a run folder with one, or a Hugging Face folder"
    assert (
        refusal(f"checkpoint.init={source.parent}")
        == f"checkpoint.init={source.parent}: {rule}; nearest valid: checkpoint.init={source}"
    )
    assert refusal(f"checkpoint.init={tmp_path}") == f"checkpoint.init={tmp_path}: {rule}; nearest valid: checkpoint.init=null"


def test_a_checkpoint_without_a_tokenizer_wants_one(source: Path, tmp_path: Path) -> None:
    made = imported(source, tmp_path)
    assert refusal(f"checkpoint.init={made}").startswith(f"checkpoint.init={made}: has no tokenizer, and none is named; nearest")
    check_config(composed(*DATA, f"checkpoint.init={made}", "tokenizer=bytes"), 1)


def test_resuming_an_import_is_refused_with_what_to_write(source: Path, tmp_path: Path) -> None:
    made = imported(source, tmp_path)
    said = refusal(f"checkpoint.resume={made}")
    assert said == (
        f"checkpoint.resume={made}: is an import, weights without a run to resume; nearest valid: checkpoint.init={made}"
    )
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    assert refusal(f"checkpoint.resume={tmp_path / 'theirs'}").endswith(f"nearest valid: checkpoint.init={tmp_path / 'theirs'}")


def test_nothing_of_this_imports_torch(source: Path) -> None:
    code = "import sys; from tokenyard.launch.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = ["train", *DATA, f"checkpoint.init={source}", "model.width=64"]
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert result.stdout == "2 False\n" and "does not fit the weights" in result.stderr


def test_printed_configurations_have_the_model(source: Path) -> None:
    words = ["train", *DATA, f"checkpoint.init={source}", "--cfg", "job"]
    result = subprocess.run([sys.executable, "-m", "tokenyard", *words], capture_output=True, text=True, check=True)
    assert "experts: 4\n" in result.stdout and "width: 32\n" in result.stdout
    drawn = subprocess.run(
        [sys.executable, "-m", "tokenyard", *words[:-2], "--layout-only"], capture_output=True, text=True, check=True
    )
    assert "4 experts in each of" in drawn.stdout


def imported(source: Path, folder: Path) -> Path:
    """A checkpoint as `tokenyard import` writes it, without a tokenizer."""
    weights = read_whole(source / "checkpoints" / "step_00000001")
    held = {f"model.{name}": LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()}
    facts: dict[str, Any] = {"config": {"model": plain_config(composed(*DATA, f"checkpoint.init={source}").model)}}
    return save_checkpoint(folder, 0, held, facts | {"step": 0, "ranks": 1, "source": {"architecture": "X", "config": {}}})
