"""Tensor parallelism with sequence parallelism between the blocks (Megatron-LM; Korthikanti et al. 2022).

Between the sublayers every tensor rank holds a slice of each sequence. Attention and dense feed-forwards gather the sequence,
compute their own heads or hidden columns, and scatter the sum. Norms, routers, shared experts work on the slice, with weights
that every rank holds whole; so does the MoE layer, which routes each token on one rank only.
"""

from typing import Any

from torch import Tensor, nn

from ..moe.linear import TiedHead
from ..moe.model import Transformer
from ..moe.tokens import Tokens
from .collectives import gather_sequence, scatter_sequence
from .mesh import Axis, Mesh
from .pieces import Piece
from .vocabulary import VocabularyParallelEmbedding

SLICED = {
    "embedding.weight": 0,
    "head.weight": 0,
    "attention.q.weight": 0,
    "attention.k.weight": 0,
    "attention.v.weight": 0,
    "attention.o.weight": 1,
    "dense.gate_up": 1,
    "dense.down": 1,
}
"""Endings of the names of sliced parameters, and the dimension that is sliced; all others are whole on every tensor rank."""


def sliced_dim(name: str) -> int | None:
    """The dimension in which tensor ranks share the parameter, or None."""
    return next((dim for ending, dim in SLICED.items() if name.endswith(ending)), None)


def apply_tensor_parallel(model: Transformer, mesh: Mesh, pieces: dict[str, Piece]) -> None:
    """Slice the weights, and put the gathers and scatters around the modules as hooks. Updates `pieces`."""
    axis = mesh.tensor
    for name, parameter in list(model.named_parameters()):
        dim = sliced_dim(name)
        if dim is not None:
            replace_parameter(model, name, parameter.chunk(axis.size, dim)[axis.rank].contiguous())
            pieces[name] = narrowed(pieces[name], dim, axis)
    model.embedding = VocabularyParallelEmbedding(
        model.get_parameter("embedding.weight"), pieces["embedding.weight"].offsets[0], axis
    )
    if isinstance(model.head, TiedHead):
        model.head = TiedHead(model.embedding)
    model.head.register_forward_pre_hook(_gather_input(axis))
    for block in model.blocks:
        for module in (block.attention, block.dense):
            if module is not None:
                module.register_forward_pre_hook(_gather_input(axis))
                module.register_forward_hook(_scatter_output(axis))
        if block.moe is not None:
            block.moe.register_forward_pre_hook(_slice_tokens(axis))


def narrowed(piece: Piece, dim: int, axis: Axis) -> Piece:
    """This rank's even share of `piece` in dimension `dim`."""
    size = piece.sizes[dim] // axis.size
    assert size * axis.size == piece.sizes[dim], f"{piece} does not divide by {axis.size} in dimension {dim}"
    offsets, sizes = list(piece.offsets), list(piece.sizes)
    offsets[dim], sizes[dim] = offsets[dim] + axis.rank * size, size
    return Piece(piece.shape, tuple(offsets), tuple(sizes))


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a new parameter in the place of the one called `name`."""
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(value.detach()))


def _gather_input(axis: Axis) -> Any:
    return lambda _module, inputs: (gather_sequence(inputs[0], axis), *inputs[1:])


def _scatter_output(axis: Axis) -> Any:
    return lambda _module, _inputs, output: scatter_sequence(output, axis)


def _slice_tokens(axis: Axis) -> Any:
    """The MoE layer gets a slice of x_BSD and the record of whole sequences: take the same slice of that."""

    def own(part_BS: Tensor | None) -> Tensor | None:
        return None if part_BS is None else part_BS.chunk(axis.size, dim=1)[axis.rank]

    def hook(_module: nn.Module, inputs: tuple[Tensor, Tokens]) -> tuple[Tensor, Tokens]:
        x_BSD, tokens = inputs
        whole = (tokens.valid_BS, tokens.ids_BS, tokens.place_BS)
        return x_BSD, Tokens(*map(own, whole), step=tokens.step, layer=tokens.layer)

    return hook
