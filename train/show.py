"""Answers --help, --cfg, --info and --hydra-help by a real Hydra application, which multirun uses too; and --layout-only."""

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

from ..moe.param_count import moe_layers
from ..parallel.communicators import communicator_table
from ..parallel.config import PipelineSchedule
from ..parallel.layout import node_ranks
from ..parallel.layout_diagram import layout_diagram
from ..parallel.pipeline.diagram import pipeline_diagram
from .config.compose import CONF, Arguments, register_schema
from .config.config import Config
from .config.environment import local_world_size, world_size
from .config.model_summary import check_model_and_layout, count, intended_ranks, per_rank
from .config.number_format import short
from .config.redact import redact
from .weight_source import compose_run


def show_layout(arguments: Arguments) -> int:
    """Prints the layout of the ranks that would be started, or of the fewest that it fits. Raises ConfigError if it is wrong."""
    config, _ = compose_run(arguments)
    world = intended_ranks(config, world_size())
    check_model_and_layout(config, world)
    print("\n".join(layout_lines(config, world)))
    return 0


def layout_lines(config: Config, world: int) -> list[str]:
    """Returns the output of --layout-only."""
    model, node, layers = config.model, ranks_of_a_node(config, world), moe_layers(config.model)
    nodes = -(-world // node)
    experts = f", {model.moe.experts} experts in {'each' if layers == model.layers else layers} of {model.layers} layers"
    held, trained = per_rank(config, world)["total"], count(model).trained
    lines = [
        f"{world} rank{'s' * (world > 1)} on {nodes} node{'s' * (nodes > 1)}{experts if layers else ', no experts'}; "
        f"of {short(trained)} parameters a rank holds {short(held)} between steps",
        "",
    ]
    if world > 1:
        lines += [*communicator_table(model, config.parallel, world, node_ranks(config.parallel, world, node)), ""]
    lines += layout_diagram(config.parallel, world, node, model.moe.experts if layers else 0)
    if config.parallel.pipeline > 1:
        lines += ["", *pipeline_diagram(model, config.parallel, micro_batches(config, world))]
    return [line.rstrip() for line in lines]


def micro_batches(config: Config, world: int) -> int:
    """Returns the micro-batches of a rank in a step; a batch that does not fit the layout is rounded up to one that does."""
    p, batch = config.parallel, config.batch
    each = batch.sequences // (world // p.tensor // p.pipeline) // (batch.micro or batch.sequences)
    interleaved = p.pipeline_schedule is PipelineSchedule["interleaved"]
    return max(1, -(-each // p.pipeline)) * p.pipeline if interleaved else max(1, each)


def ranks_of_a_node(config: Config, world: int) -> int:
    """Returns launch.ranks if it is set, or torchrun's value; otherwise all ranks are on one node."""
    if config.launch.ranks * config.launch.nodes > 1:
        return min(config.launch.ranks, world)
    return min(local_world_size() or world, world)


def show(arguments: Arguments) -> int:
    """Prints what the flags ask for, without training. Returns the exit code. Raises ConfigError if the overrides are wrong."""
    if arguments.layout_only:
        return show_layout(arguments)
    _, arguments = compose_run(arguments)
    flags = ["--help"] if arguments.help else []
    flags += ["--hydra-help"] if arguments.hydra_help else []
    flags += ["--resolve"] if arguments.resolve else []
    flags += [f"--cfg={arguments.cfg}"] if arguments.cfg else []
    flags += [f"--package={arguments.package}"] if arguments.package else []
    flags += [f"--info={arguments.info}"] if arguments.info else []
    output = io.StringIO()
    with redirect_stdout(output):
        code = hydra_application(lambda config: None, arguments, flags, [])
    sys.stdout.write(redact(output.getvalue()))
    return code


def hydra_application(
    task: Callable[[Any], object], arguments: Arguments, flags: list[str], overrides: list[str], name: str = "tokenyard train"
) -> int:
    """Runs hydra.main as `name` with `flags`, and with `overrides` after those of `arguments`. Returns the exit code."""
    import hydra

    register_schema()
    # Hydra then raises its errors instead of printing several lines, and the caller reports them.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    folder = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    application = hydra.main(config_path=str(CONF), config_name="config", version_base=None)(task)
    # Hydra reads only the command line of the process.
    before, sys.argv = sys.argv, [name, *flags, *folder, *arguments.overrides, *overrides]
    try:
        application()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0
