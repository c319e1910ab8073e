"""The parts of `make gpu`, the cheapest and most telling first. Needs no torch."""

from typing import NamedTuple


class Part(NamedTuple):
    name: str
    about: str
    module: str
    """Of this package; its function `run` takes a Teller."""
    seconds: float
    """After so long it is ended."""
    group: str = "correctness"


PARTS = (
    Part("machine", "what this runs on", "machine", 90, "machine"),
    Part("products", "grouped products and activations, with empty, unaligned and single-row groups", "products", 40),
    Part("presets", "every tiny model: forward, losses, gradients and three steps", "models", 100),
    Part("routers", "every router, selection and capacity, the same way", "routers", 60),
    Part("exchanges", "NCCL with a world of one: collectives, FSDP2 and each exchange", "alone", 40),
    Part("waits", "where the host waits for the device", "waits", 30),
    Part("saves", "resume bit for bit, and an asynchronous save against a synchronous one", "saves", 60),
    Part("layouts", "two GPUs: each layout of two against one process", "layouts", 60),
    Part("layers", "forward and backward of MoE layers of known models", "layers", 110, "speed"),
    Part("steps", "whole training steps", "steps", 70, "speed"),
    Part("kernels", "where the time and the memory of a step go", "kernels", 50, "time"),
    Part("compile", "torch.compile on and off", "compiling", 70),
    Part("command", "tokenyard train, killed and resumed", "command", 60),
)
TINY_FACTOR = 5.0
"""Parts that try the code on a CPU may take so many times as long."""
BY_NAME = {part.name: part for part in PARTS}
TOTAL_SECONDS = 465.0
"""Of all parts together: what is left of 8 minutes is for starting and reporting."""
