"""`tokenyard plan model=... cluster=...`: the layouts of a cluster that fit and are fastest, and what a run on them takes."""

import json
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..plan.calibrate import Calibration, calibrate
from ..plan.experiment_file import write_experiment
from ..plan.gpu_cluster import Cluster, read_cluster
from ..plan.search import Found, Goal, Planner
from ..plan.search_report import PlannedRun, as_json, explained, layout_json, lines
from ..plan.workload import StepBatch, workload
from ..train.config.compose import CONF, parse_arguments
from ..train.config.config import Config, ConfigError, EngineKind, Precision
from ..train.config.launch import Launcher
from ..train.config.model_summary import count
from ..train.config.validate import check_rules
from ..train.weight_source import compose_run
from .words import one_of, positive_number, shown_name, split_words

OWN = ("cluster", "goal", "tokens", "batch.tokens", "hot", "calibrate")
"""Words of the search alone; all others are overrides as for `tokenyard train`."""
LOSS = "loss"
"""The goal of loss_command.py, which searches models and no layouts."""
LENGTH = 4096
"""Tokens of a sequence, unless said otherwise."""
STEP_TOKENS = 2**22
"""Tokens of a step, unless said otherwise."""


class SearchWords(NamedTuple):
    """What is searched."""

    config: Config
    model: str
    groups: list[str]
    """The words that choose options of groups, the experiment first."""
    cluster: Cluster
    goal: Goal
    tokens: float
    """Of the run."""
    hot: float
    fixed: dict[str, Any]
    """Settings of `parallel` that stay, and `micro`."""
    calibration: Calibration | None
    """What replaces the committed coefficients of the step time."""


def search_command(arguments: Namespace) -> None:
    """Prints the table, one object, or one layout, and writes its experiment. Raises ConfigError."""
    asked, begun = read_search_words(arguments.words, arguments.config_dir), time.monotonic()
    calibration = asked.calibration
    planner = Planner(asked.config, asked.cluster, asked.hot, calibration and calibration.coefficients)
    found = planner.search(asked.goal, asked.fixed)
    took = time.monotonic() - begun
    run = PlannedRun(asked.tokens, asked.config.batch.sequences * asked.config.sequence_length, asked.cluster.gpu)
    chosen = arguments.explain or 1
    if (arguments.explain or arguments.write) and chosen > len(found.best):
        _refuse_number(chosen, found)
    if arguments.explain:
        planned = found.best[chosen - 1]
        batch = StepBatch(planned.candidate.batch.sequences, planned.candidate.micro)
        counts = workload(planner.work, planned.candidate.parallel, batch, replace(asked.cluster, ranks=planned.candidate.world))
        shown = layout_json(planned, run) if arguments.json else "\n".join(explained(planned, counts, run))
    else:
        shown = as_json(found, run, took) if arguments.json else "\n".join(lines(found, run, took, str(asked.cluster), asked.model))
    if calibration is not None:
        shown = _with_calibration(shown, calibration, asked.cluster)
    print(json.dumps(shown) if arguments.json else shown)
    if arguments.write:
        _write(arguments, asked, found, chosen)


def _with_calibration(shown: Any, calibration: Calibration, cluster: Cluster) -> Any:
    """Returns the text or the object that is printed, with the file that its times come from."""
    gpu, names = calibration.gpu.name, ", ".join(calibration.replaced)
    if isinstance(shown, dict):
        return shown | {"calibrated": {"file": str(calibration.path), "gpu": gpu, "coefficients": list(calibration.replaced)}}
    other = "" if gpu == cluster.gpu.name else f", which is not the cluster's {cluster.gpu.name}"
    return f"{shown}\n\ntimes by {calibration.path}, measured on {gpu}{other}: {names}"


def _write(arguments: Namespace, asked: SearchWords, found: Found, chosen: int) -> None:
    key, _, name = arguments.write.partition("=")
    if key != "experiment" or not name:
        raise ConfigError.of("--write", arguments.write, "must be experiment=NAME", "--write experiment=mine")
    own = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    config, groups = asked.config, [word.split("=") for word in asked.groups]
    base = compose_run(parse_arguments([*asked.groups, "launch=torchrun", *own]))[0]
    steps = max(1, round(asked.tokens / (config.batch.sequences * config.sequence_length)))
    lines = [option if group == "experiment" else f"override /{group}: {option}" for group, option in groups]
    wanted = replace(config, steps=steps), base, [*lines, "override /launch: torchrun"]
    folder = Path(arguments.config_dir) if arguments.config_dir else CONF
    path = write_experiment(folder, name, *wanted, found.best[chosen - 1].candidate, asked.model)
    if not arguments.json:
        option = f" --config-dir {arguments.config_dir}" if arguments.config_dir else ""
        print(f"\n{path}: tokenyard train{option} experiment={name}")


def _refuse_number(chosen: int, found: Found) -> None:
    if not found.best:
        raise ConfigError(
            f"plan: no layout fits, {found.refused[0].least.memory.peak / 1e9:.0f} GB at least; nearest valid: goal=fits"
        )
    raise ConfigError.of(
        "--explain", chosen, f"must be at most the {len(found.best)} layouts of the table", f"--explain {len(found.best)}"
    )


def read_search_words(words: list[str], config_dir: str | None = None) -> SearchWords:
    """Returns the configuration without a layout, and what to search. Raises ConfigError."""
    own, rest = split_words(words, OWN)
    keys = [word.partition("=")[0] for word in rest]
    if "cluster" not in own:
        raise ConfigError("cluster: says on which GPUs; nearest valid: cluster=h100x64")
    cluster = read_cluster(own["cluster"])
    goal = one_of("goal", own.get("goal", "fastest"), [*Goal.__members__, LOSS])
    defaults = [] if "experiment" in keys else [f"sequence_length={LENGTH}"]
    folder = ["--config-dir", config_dir] if config_dir else []
    config = compose_run(parse_arguments([*defaults, *rest, *folder]))[0]
    _fill(config, own, keys, cluster)
    check_rules(
        replace(config, parallel=type(config.parallel)(), batch=replace(config.batch, sequences=cluster.ranks, micro=1)),
        cluster.ranks,
    )
    linear = sum(config.model.linear_layer(index) for index in range(config.model.layers))
    if linear:
        rule = f"has {linear} layers of gated DeltaNet, whose memory only the dry run knows"
        raise ConfigError(f"plan: the model {rule}; nearest valid: tokenyard plan --dry-run")
    fixed = {key.removeprefix("parallel."): None for key in keys if key.startswith("parallel.")}
    fixed = {name: getattr(config.parallel, name) for name in fixed}
    if "batch.micro" in keys:
        fixed["micro"] = config.batch.micro
    calibration = calibrate(Path(own["calibrate"])) if "calibrate" in own else None
    tokens = positive_number("tokens", own["tokens"], "1e9") if "tokens" in own else 20.0 * count(config.model).active
    hot = positive_number("hot", own.get("hot", "1"), "1")
    groups = sorted(
        (word for word, key in zip(rest, keys, strict=True) if key != "launch" and (CONF / key).is_dir()),
        key=lambda word: not word.startswith("experiment="),
    )
    return SearchWords(config, shown_name(rest), groups, cluster, Goal(goal), tokens, hot, fixed, calibration)


def _fill(config: Config, own: dict[str, str], keys: list[str], cluster: Cluster) -> None:
    """Sets the batch, the precision and the launcher."""
    if config.engine.kind is EngineKind.deepspeed:
        raise ConfigError.of("engine.kind", "deepspeed", "the planner knows tokenyard's own engine", "engine=torch")
    if config.precision is Precision.auto:
        config.precision = Precision.bf16
    if config.precision is not Precision.bf16:
        raise ConfigError.of("precision", config.precision.value, "must be bf16, in which GPUs train", "precision=bf16")
    if "batch.tokens" in own or ("batch.sequences" not in keys and "experiment" not in keys):
        tokens = positive_number("batch.tokens", own["batch.tokens"], "1e9") if "batch.tokens" in own else STEP_TOKENS
        unit = cluster.ranks
        config.batch.sequences = max(1, round(tokens / config.sequence_length / unit)) * unit
    config.launch.kind, config.launch.ranks = Launcher.torchrun, min(cluster.ranks, cluster.gpu.host)
    config.launch.nodes = max(1, cluster.ranks // config.launch.ranks)
