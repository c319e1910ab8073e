"""Files, links, settings and names in the documents exist, and every command that they show would run."""

import ast
import importlib
import itertools
import pkgutil
import re
import shlex
import shutil
import subprocess
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra.core.override_parser.types import Glob, IntervalSweep
from tokenyard.checkpoint.store import save_checkpoint
from tokenyard.launch.launchers.torchrun import check_hosts
from tokenyard.launch.main import VERBS, main
from tokenyard.launch.parser import with_config_dir
from tokenyard.launch.plan_command import OWN as DRY_RUN_WORDS
from tokenyard.launch.plan_command import read_words
from tokenyard.launch.push import read_words as read_push
from tokenyard.launch.search_command import OWN as SEARCH_WORDS
from tokenyard.launch.search_command import read_search_words
from tokenyard.launch.serve_command import read_deployment
from tokenyard.parity.command import plan_comparison
from tokenyard.parity.config import split_settings
from tokenyard.train.config.compose import CONF, compose, own_folders, parse_arguments
from tokenyard.train.config.group_words import spelled_out
from tokenyard.train.config.launch import Launcher
from tokenyard.train.config.overrides import Groups, find_groups, parse_override
from tokenyard.train.config.reference import reference
from tokenyard.train.config.schema import REMOVED, settings
from tokenyard.train.config.serialize import config_from_plain, plain_config, write_config
from tokenyard.train.preflight import check_config
from tokenyard.train.saved_run import with_run

ROOT = Path(__file__).resolve().parents[2]
MEASURED = ROOT / "tests" / "plan" / "report_h100.json"
"""Stands for the report of `make gpu`."""
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = "bench|conf|data|docs|interop|launch|moe|parallel|parity|report|tests|train"
MADE_BY_RUNS = {"begun.json", "config.yaml", "metrics.jsonl", "telemetry.jsonl", "events.jsonl", "manifest.json"}
MADE_BY_RUNS |= {"report.json", "report.md"}
KEY_OF_A_RECORD = re.compile(r"moe/\w+(/layer_\d)?")
PLACEHOLDERS = {"group=option", "key=value", "model=NAME"}
OF_PLAN = {*DRY_RUN_WORDS, *SEARCH_WORDS}
"""Words of `tokenyard plan` alone."""
SET_UP = {
    'eval "$(tokenyard -sc install=bash)"',
    "tokenyard -sc install=fish | source",
    "source .venv/bin/activate",
    ".venv/bin/pre-commit install",
}


class Part(NamedTuple):
    """A fenced block (its language before it) or a span of inline code, and the document it stands in."""

    document: Path
    text: str


def blocks(language: str) -> list[Part]:
    return [Part(d, text) for d in DOCUMENTS for text in re.findall(rf"^```{language}\n(.*?)^```$", d.read_text(), re.M | re.S)]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)


def spans() -> list[Part]:
    return [Part(document, span) for document in DOCUMENTS for span in re.findall(r"`([^`\n]+)`", prose(document))]


def commands() -> list[str]:
    """Each command once: the lines of shell blocks, and spans that begin like one."""
    lines = [line for block in blocks("sh") for line in block.text.replace("\\\n", " ").splitlines() if line.strip()]
    inline = [
        span.text for span in spans() if re.match(r"(tokenyard|torchrun|make|source|\.venv/bin/[\w-]+) \S|python -m", span.text)
    ]
    return sorted({" ".join(command.split()) for command in [*lines, *inline]})


def test_every_link_leads_somewhere() -> None:
    links = [Part(d, target) for d in DOCUMENTS for target in re.findall(r"\]\(([^)\s]+)\)", prose(d))]
    assert len(links) > 50
    local = [link for link in links if not link.text.startswith("https://")]
    assert [link for link in local if not (link.document.parent / link.text.partition("#")[0]).exists()] == []


def test_every_named_file_exists() -> None:
    named = [
        (document.name, name.rstrip("."))
        for document in DOCUMENTS
        for name in re.findall(rf"(?<![\w/.=-])((?:{FOLDERS})/[\w./-]*|[\w-]+\.(?:py|md|toml))", document.read_text())
        if not KEY_OF_A_RECORD.fullmatch(name)
    ]
    assert len(named) > 50
    assert [name for name in named if not (ROOT / name[1]).exists() and not (ROOT / "docs" / name[1]).exists()] == []


def test_every_dotted_name_is_a_setting_or_in_the_code() -> None:
    dotted = {span.text for span in spans() if re.fullmatch(r"[a-z_]+(\.\w+)+", span.text)} - MADE_BY_RUNS
    unknown = []
    for name in sorted(dotted - set(settings()) - set(REMOVED)):
        try:
            pkgutil.resolve_name(name if name.startswith(("torch.", "tokenyard.")) else f"tokenyard.{name}")
        except (ImportError, AttributeError):
            unknown.append(name)
    assert len(dotted) > 20
    assert unknown == []


@pytest.mark.parametrize("text", sorted({s.text for s in spans() if re.fullmatch(r"([a-z][\w.]*=\S+ ?)+", s.text)} - PLACEHOLDERS))
def test_every_override_composes(text: str) -> None:
    _, overrides = split_settings(shlex.split(text))
    compose([word for word in overrides if word.partition("=")[0] not in {"launch.ranks", *OF_PLAN}])


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents' relative paths may lead to: each test has a copy."""
    folder = tmp_path_factory.mktemp("readers")
    (folder / "texts").mkdir()
    for name in ("a.txt", "a.md"):
        (folder / "texts" / name).write_text("text")
    (folder / "mixtral").mkdir()
    (folder / "mixtral" / "tokenizer.json").write_text("{}")
    (folder / "card.json").write_text('{"total_parameters": 671e9}')
    for number in range(100):
        (folder / "texts" / f"{number}.txt").write_text(f"Text {number} of 100, with some words. " * 10)
    for block in blocks("yaml"):
        if named := re.search(r"^# (mine/\S+)$", block.text, re.M):  # a file of the reader's own
            (folder / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (folder / named[1]).write_text(block.text)
    for run in ("first", "one", "four", "stable"):
        (folder / "runs" / run).mkdir(parents=True)
    for run, steps, config in (("first", (400, 600), compose([])), ("stable", (800,), compose(["schedule=wsd"]))):
        for step in steps:
            save_checkpoint(folder / "runs" / run / "checkpoints", step, {}, {"config": plain_config(config)})
        write_config(config, folder / "runs" / run / "config.yaml")
    return folder


@pytest.mark.parametrize("command", commands())
def test_every_command_would_run(command: str, readers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shutil.copytree(readers, tmp_path / "reader"))
    words = shlex.split(command)
    match words:
        case _ if command in SET_UP:
            pass
        case ["make", target, *arguments]:
            make(target, arguments)
        case ["tokenyard", "train", *arguments]:
            trains(arguments, None)
        case ["tokenyard", "params", *arguments]:
            arguments = arguments[: arguments.index("|")] if "|" in arguments else arguments
            own = [word for word in arguments if word not in ("HF_FOLDER", ">", "docs/models.md", "model=NAME")]
            monkeypatch.setattr("tokenyard.launch.models_page.models_page", lambda: "")  # tests/conf/test_presets.py compares it
            assert main(["params", *(own or ["model=default"])]) == 0
        case ["tokenyard", "plan" | "audit"] | ["tokenyard", "plan", "serve" | "--dry-run"]:
            pass
        case ["tokenyard", "plan", "--dry-run", *arguments]:
            assert read_words(arguments)
        case ["tokenyard", "plan", "serve", *arguments]:
            assert read_deployment([word for word in arguments if word != "--json"])
        case ["tokenyard", "plan", "goal=loss", *arguments]:
            assert main(["plan", "goal=loss", *arguments]) == 0
        case ["tokenyard", "plan", "calibrate=FILE"]:
            pass
        case ["tokenyard", "plan", "calibrate=gpu-report/report.json"]:
            assert main(["plan", f"calibrate={MEASURED}"]) == 0
        case ["tokenyard", "plan", *arguments]:
            arguments = [word.replace("gpu-report/report.json", str(MEASURED)) for word in arguments]
            words = [word for word in arguments if word.partition("=")[0] in ("model", *SEARCH_WORDS) and "..." not in word]
            assert read_search_words([*words, "model=mixtral_8x7b"] if "model=..." in arguments else words)
        case ["tokenyard", "audit", *arguments]:
            assert main(["audit", *arguments]) in (0, 1)
        case ["tokenyard", "parity", *arguments]:
            if arguments[:1] == ["--config-dir"]:
                arguments = [*arguments[2:], f"--config-dir={arguments[1]}"]
            assert plan_comparison(*split_settings(arguments))[1]
        case ["tokenyard", "import" | "export" as verb, *_]:
            assert verb in VERBS
        case ["tokenyard", "checkpoint", "inspect|verify|diff", *_]:
            pass
        case ["tokenyard", "push", _, *arguments]:
            assert read_push([each for each in arguments if each != "--dry-run"]).repo
        case ["tokenyard", "data", "verify", folder]:
            monkeypatch.setattr("tokenyard.launch.data_commands.verify", lambda path, as_json: int(path != folder))
            assert main(words[1:]) == 0
        case ["tokenyard", "report" | "watch" as verb, *arguments]:
            monkeypatch.setattr(
                f"tokenyard.report.{'command' if verb == 'report' else 'server'}.{verb}_command", lambda arguments: 0
            )
            assert main([verb, *arguments]) == 0
        case ["tokenyard", *arguments]:
            monkeypatch.setattr("tokenyard.launch.generate.generate_command", lambda arguments: 0)
            monkeypatch.setattr("tokenyard.launch.evaluate.evaluate_command", checked_evaluation)
            assert main(arguments) == 0
        case ["torchrun", *arguments]:
            flags, own = arguments[: arguments.index("-m")], arguments[arguments.index("-m") + 1 :]
            assert own[0] == "tokenyard.train"
            trains(own[1:], number(flags, "--nnodes") * number(flags, "--nproc-per-node"))
        case ["python", "-m", module, *arguments] if module.startswith("tokenyard.bench."):
            benchmark(module, arguments)
        case ["python", "-m", module, *_] if module.startswith("tokenyard.plan."):
            assert hasattr(pkgutil.resolve_name(module), "main")
        case ["deepspeed", "--num_gpus", ranks, "--module", "tokenyard.train", *arguments]:
            trains(arguments, int(ranks))
        case ["python" | ".venv/bin/python", "-m", module, ">", file]:
            assert module.startswith("tokenyard.")
            assert (ROOT / (module.replace(".", "/").removeprefix("tokenyard/") + ".py")).is_file() and (ROOT / file).is_file()
        case _:
            pytest.fail(f"this test does not know {command}")


def benchmark(module: str, arguments: list[str]) -> None:
    """The benchmark's parser accepts the arguments."""
    folder = (ROOT / module.removeprefix("tokenyard.").replace(".", "/")).is_dir()
    found = importlib.import_module(f"{module}.__main__" if folder else module)
    found.parse(arguments)


def test_the_contract_is_shown() -> None:
    shown = "\n".join(commands())
    for part in (
        "make train ARGS",
        "make test",
        "torchrun --nproc",
        "launch=torchrun",
        "--cfg job",
        "train -m",
        "generate",
        "evaluate",
    ):
        assert part in shown, part


def test_configuration_is_up_to_date() -> None:
    again = "python -m tokenyard.train.config.reference > docs/configuration.md"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), f"run {again}"


def test_every_setting_and_option_has_a_sentence() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    leaves = {key for key, (kind, _) in settings().items() if not is_dataclass(kind)}
    options = {f"{group}={option}" for group, found in find_groups([CONF]).items() for option in found}
    assert {row[0].strip("|` ") for row in rows} == leaves | options
    assert [row[0] for row in rows if len(row[-1].strip("| ")) < 5] == []


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python"):
        ast.parse(block.text)
        if block.document.name == "README.md":
            exec(compile(block.text, "README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out


def test_the_picture_of_the_layout() -> None:
    """It is the output of the command above it: tests/train/test_show_layout.py checks the file."""
    (block,) = [block for block in blocks("text") if "group of " in block.text]
    assert block.document.name == "README.md"
    assert block.text == (ROOT / "tests" / "golden" / "layouts" / "8_ranks.txt").read_text()
    assert (
        "tokenyard train --layout-only parallel.tensor=2 parallel.shard=2 parallel.expert=4 launch=torchrun launch.ranks=8"
        in commands()
    )


def make(target: str, arguments: list[str]) -> None:
    """The target is one that `make help` lists; its ARGS are for training, or name tests."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    listed = subprocess.run(["make", "-s", "-C", ROOT, "help"], capture_output=True, text=True, check=True).stdout
    assert target in {line.split()[0] for line in listed.splitlines() if line.strip()}
    for argument in arguments:
        name, _, value = argument.partition("=")
        assert name == "ARGS"
        if target == "train":
            trains(shlex.split(value), None)
        elif target == "gpu":
            benchmark("tokenyard.bench.gpu", shlex.split(value))
        else:
            assert all((ROOT / word).exists() for word in shlex.split(value) if "/" in word)


def trains(arguments: list[str], world: int | None) -> None:
    """Every point of a sweep composes and is valid on the ranks that the command, or its launch settings, start.

    Plugins of Hydra are not installed: tests/launch/test_sweep.py tries them where they are.
    """
    plugins = ("hydra/", "hydra.sweeper", "hydra.launcher")
    parsed = with_run(parse_arguments([word for word in arguments if not word.startswith(plugins)]))
    folder = [f"--config-dir={parsed.config_dir}"] if parsed.config_dir else []
    groups = find_groups([CONF, *own_folders(parsed)])
    for point in points(parsed.overrides, groups) if parsed.multirun else [parsed.overrides]:
        config = compose([*point, *folder])
        started = config.launch.kind is not Launcher.inline
        check_config(config, world or (config.launch.nodes * config.launch.ranks if started else 1))
        if config.launch.kind is Launcher.torchrun and world is None:
            check_hosts(config)


def points(overrides: list[str], groups: Groups) -> list[list[str]]:
    choices = []
    for override in (parse_override(text, groups) for text in overrides):
        found: Any = override.value()
        values = [override.input_line]
        if isinstance(found, Glob):
            values = [f"{override.key_or_group}={option}" for option in found.filter(groups[override.key_or_group])]
        elif isinstance(found, IntervalSweep):
            values = [f"{override.key_or_group}={end}" for end in (found.start, found.end)]
        elif override.is_sweep_override():
            values = [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        choices.append(values)
    return [[str(text) for text in point] for point in itertools.product(*choices)]


def number(flags: list[str], name: str) -> int:
    return int(flags[flags.index(name) + 1]) if name in flags else 1


def checked_evaluation(arguments) -> int:
    config_from_plain(plain_config(compose([])), spelled_out(parse_arguments(with_config_dir(arguments.overrides, arguments))))
    return 0
