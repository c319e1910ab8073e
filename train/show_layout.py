"""`tokenyard train --layout-only ...`: the layout as a picture. Nothing is started, torch is not imported."""

from ..moe.param_count import moe_layers
from ..parallel.layout_diagram import picture
from .arguments import Arguments
from .compose import compose_arguments
from .config import Config
from .console.text import short
from .environment import local_world_size, world_size
from .params import check, count, per_rank, ranks_of


def show_layout(arguments: Arguments) -> int:
    """Prints it for the ranks that are started or would be, else for the fewest that it fits. ConfigError for a wrong layout."""
    config = compose_arguments(arguments)
    world = ranks_of(config, world_size())
    check(config, world)
    print("\n".join(layout_lines(config, world)))
    return 0


def layout_lines(config: Config, world: int) -> list[str]:
    """The whole output."""
    model, node, layers = config.model, ranks_of_a_node(config, world), moe_layers(config.model)
    nodes = -(-world // node)
    experts = f", {model.moe.experts} experts in {'each' if layers == model.layers else layers} of {model.layers} layers"
    held, trained = per_rank(config, world)["total"], count(model).trained
    lines = [
        f"{world} {_plural('rank', world)} on {nodes} {_plural('node', nodes)}{experts if layers else ', no experts'}; "
        f"of {short(trained)} parameters a rank holds {short(held)} between steps",
        "",
    ]
    return [line.rstrip() for line in lines + picture(config.parallel, world, node, model.moe.experts if layers else 0)]


def ranks_of_a_node(config: Config, world: int) -> int:
    """launch.ranks if it is set, or what torchrun says; else all ranks are on one node."""
    if config.launch.ranks * config.launch.nodes > 1:
        return min(config.launch.ranks, world)
    return min(local_world_size() or world, world)


def _plural(word: str, number: int) -> str:
    return word if number == 1 else f"{word}s"
