"""Counts a model's parameters by part, its FLOPs per token and the size of its cache, from the configuration. Without torch.

FLOPs follow PaLM (Chowdhery et al. 2022), appendix B, with two differences that matter for MoE: only the experts that a token
passes are counted, and causal attention looks back over (S + 1) / 2 tokens on average, not S. One multiply-add is 2 FLOPs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .config import AttentionKind, ModelConfig, Score, Selection
from .param_shapes import Shapes, head_width, shapes

PARTS = ("embedding", "attention", "router", "experts", "shared", "dense", "norms", "head", "mtp")
"""The parts of a model, fields of `Count`."""


@dataclass
class Count:
    """Parameters by part, summed over all layers; a token passes `active_experts` of the `experts` and all of the rest."""

    embedding: int
    attention: int
    router: int
    experts: int
    active_experts: int
    """Parameters of the top_k experts of a token. Null experts take their share of the choices, as if the load were even."""
    shared: int
    dense: int
    norms: int
    """Norms of queries and keys included."""
    head: int
    """0 if the head uses the embedding's weights."""
    mtp: int = 0
    """Modules of multi-token prediction: trained, but not part of the final model, so not in `total` or `active`."""

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return self.active + self.experts - self.active_experts

    @property
    def active(self) -> int:
        """Parameters that a token uses; embedding and head count in full (as in Mixtral's 12.9B, DeepSeek-V3's 37B)."""
        always = self.embedding + self.attention + self.router + self.shared + self.dense + self.norms + self.head
        return always + self.active_experts

    @property
    def trained(self) -> int:
        """Parameters in training."""
        return self.total + self.mtp


def count(config: ModelConfig) -> Count:
    """Counts the parameters of the model that `config` describes."""
    parts = sum_by_part(shapes(config))
    return Count(active_experts=_active(config, parts["experts"]), **parts)


def sum_by_part(found: Shapes) -> dict[str, int]:
    """Sums the elements of `found` by part; has a key for every part."""
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, shape in found.items():
        parts[part_of(name)] += math.prod(shape)
    return parts


def part_of(name: str) -> str:
    """Returns the part that the parameter with this global name belongs to."""
    if name.startswith("mtp."):
        return "mtp"
    if name.endswith("norm.weight"):
        return "norms"
    inside = {".attention.": "attention", ".router.": "router", ".experts.": "experts", ".shared": "shared", ".dense.": "dense"}
    return next((part for word, part in inside.items() if word in name), name.partition(".")[0])


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Returns the FLOPs of one token in the forward pass, averaged over a causal sequence of `sequence_length` tokens.

    2 x (attention + router + active experts + shared + dense + head weights) for the products with weights, and per layer
    2 x heads x (width of a key + width of a value) x the mean number of tokens attended to: (S + 1) / 2, or fewer in a window.
    Not counted are look-ups, norms, biases, softmax, rotary embedding and activations, nor masked tokens in blocks that attention
    computes; masks between packed documents subtract nothing. Latent attention counts as in training, with keys and values of every
    head. A layer of gated DeltaNet has 2 x 3 x value heads x width of a key x width of a value instead: its recurrence reads the
    state for the key and for the query and writes to it. Computing it by chunks takes more.
    """
    main = {name: shape for name, shape in shapes(config).items() if part_of(name) != "mtp"}
    return _flops(config, main, range(config.layers), 1, sequence_length)


def flops_by_layer(config: ModelConfig, sequence_length: int) -> tuple[list[int], int]:
    """Returns the FLOPs of one token in the forward pass of each layer, and those of the head and multi-token prediction."""
    found = shapes(config)

    def cost(prefix: str, layers: Sequence[int], heads: int) -> int:
        inside = {name: shape for name, shape in found.items() if name.startswith(prefix)}
        return _flops(config, inside, layers, heads, sequence_length)

    predicting = range(config.layers, config.layers + config.mtp_depth)
    return [cost(f"layers.{i}.", [i], 0) for i in range(config.layers)], cost("mtp.", predicting, 1 + config.mtp_depth)


def training_flops_per_token(config: ModelConfig, sequence_length: int, recompute: str = "none") -> int:
    """Returns the FLOPs of one token in forward and backward: 3 x forward, for MFU, and what is computed again besides, for HFU.

    `recompute` is none, offload, block (4 x forward) or selective (`repeated_flops_per_token`).

    Includes multi-token prediction, as if each module predicted for all tokens of the sequence.
    """
    mtp = {name: shape for name, shape in shapes(config).items() if part_of(name) == "mtp"}
    layers = range(config.layers, config.layers + config.mtp_depth)
    predictions = _flops(config, mtp, layers, config.mtp_depth, sequence_length)
    forward = flops_per_token(config, sequence_length) + predictions
    again = {"none": 0, "offload": 0, "block": forward, "selective": repeated_flops_per_token(config, sequence_length)}
    return 3 * forward + again[recompute]


def repeated_flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Returns the FLOPs of one token that selective recomputation repeats on a GPU, without tensor parallelism.

    Those are products of rows narrower than the model, gated DeltaNet, and FlexAttention (moe/recompute.py). A product that ends a
    block, such as that of a shared expert without a gate on one device, is counted, though nobody needs its result again.
    """
    narrow = {name: shape for name, shape in shapes(config).items() if ".experts." not in name and shape[-1] < config.width}
    repeated = [
        index
        for index in range(config.layers + config.mtp_depth)
        if config.linear_layer(index)
        or config.attention.sinks
        or config.attention.softcap is not None
        or _window(config, index, sequence_length) < sequence_length
    ]
    return _flops(config, narrow, repeated, 0, sequence_length)


def kv_cache_elements(config: ModelConfig, tokens: int) -> int:
    """Returns the elements of the cache of `tokens` tokens: keys and values, or the latent and one rotary key (DeepSeek-V2).

    A layer with a window caches no more tokens than the window. One of gated DeltaNet has its states and the last inputs of its
    convolutions, whatever the tokens.
    """
    delta, each = config.attention.delta, kv_width(config)
    linear = sum(config.linear_layer(index) for index in range(config.layers))
    convolved = 2 * delta.key_heads * delta.key_width + delta.value_heads * delta.value_width
    return linear * (_state(config) + (delta.kernel - 1) * convolved) + each * sum(
        _window(config, index, tokens) for index in range(config.layers) if not config.linear_layer(index)
    )


def kv_width(config: ModelConfig) -> int:
    """Returns the elements of a token in the cache of one layer: key and value, or the latent and the rotary key."""
    mla, latent = config.attention.mla, config.attention.kind is AttentionKind.mla
    return mla.kv_rank + mla.rope_width if latent else 2 * config.kv_heads * head_width(config)


def _flops(config: ModelConfig, found: Shapes, layers: Sequence[int], heads: int, length: int) -> int:
    """FLOPs of the weights in `found`, of `heads` products with the head, and of the attention of `layers`."""
    products = heads * config.vocabulary * config.width + sum(_multiplied(config, *item) for item in found.items())
    linear = sum(config.linear_layer(index) for index in layers)
    pairs = sum(_pairs(length, _window(config, index, length)) for index in layers if not config.linear_layer(index))
    attention = 2 * config.heads * _key_and_value(config) * pairs // length
    return 2 * products + attention + 2 * 3 * linear * _state(config)


def _state(config: ModelConfig) -> int:
    """Returns the elements of the states of a layer of gated DeltaNet."""
    delta = config.attention.delta
    return delta.value_heads * delta.key_width * delta.value_width


def _multiplied(config: ModelConfig, name: str, shape: tuple[int, ...]) -> int:
    """Returns the number of elements of a parameter that a token is multiplied with."""
    if (
        len(shape) < 2
        or name.rpartition(".")[2] not in ("weight", "gate_up", "down")
        or name in ("embedding.weight", "head.weight")
    ):
        return 0
    return _active(config, math.prod(shape)) if ".experts." in name else math.prod(shape)


def _pairs(length: int, window: int) -> int:
    """Returns the number of (query, key) pairs of a sequence that attention computes."""
    return window * (window + 1) // 2 + (length - window) * window


def _window(config: ModelConfig, index: int, length: int) -> int:
    """Returns the most tokens that a token of layer `index` attends to."""
    return min(length, config.attention.window or length) if config.windowed_layer(index) else length


def _key_and_value(config: ModelConfig) -> int:
    """Returns the width of a head's key plus that of its value."""
    mla = config.attention.mla
    if config.attention.kind is AttentionKind.mla:
        return mla.nope_width + mla.rope_width + mla.value_width
    return 2 * head_width(config)


def _active(config: ModelConfig, experts: int) -> int:
    """Returns how many of the elements of `experts` a token uses; with expert choice or null experts on average."""
    choices = config.moe.experts + config.moe.router.null_experts
    return experts * config.moe.top_k // choices if experts else 0


# A description of a model's routing.


def describe_routing(config: ModelConfig) -> str:
    """E.g. top-8 of 256 from 4 of 8 groups, sigmoid scores, normalized, x 2.5, shared expert of 2048, balance by expert bias."""
    return ", ".join(_words(config)) if moe_layers(config) else "dense"


def moe_layers(config: ModelConfig) -> int:
    """Returns the number of layers with experts."""
    return sum(config.moe_layer(index) for index in range(config.layers))


def _words(config: ModelConfig) -> Iterator[str]:
    moe, router = config.moe, config.moe.router
    groups = f" from {router.top_groups} of {router.groups} groups" if router.groups > 1 else ""
    yield _selection(config) + groups
    if router.selection is not Selection.hash:
        yield f"{router.score.name} of the chosen" if router.softmax_after_top_k else _score(router.score)
        if router.normalize_top_k and (moe.top_k > 1 or router.normalize_one) and not router.softmax_after_top_k:
            yield "normalized"
    if router.scale != 1:
        yield f"x {router.scale:g}"
    if zero := router.null_experts - router.copy_experts - router.constant_experts:
        yield f"{zero} more compute nothing"
    if router.copy_experts:
        yield f"{router.copy_experts} return the token"
    if router.constant_experts:
        yield f"{router.constant_experts} a learned constant"
    if moe.shortcut:
        yield "on a shortcut beside a dense feed-forward"
    if moe.shared_hidden:
        yield f"{'gated ' * moe.shared_gate}shared expert of {moe.shared_hidden}"
    if moe.balance.bias_rate:
        yield "balance by expert bias"
    if moe.capacity.factor is not None:
        yield f"capacity {moe.capacity.factor:g}"


def _selection(config: ModelConfig) -> str:
    K, E = config.moe.top_k, config.moe.experts
    match config.moe.router.selection:
        case Selection.top_k:
            return f"top-{K} of {E}"
        case Selection.gshard:
            return f"top-{K} of {E}, the second at random"
        case Selection.expert_choice:
            return f"expert choice, {K} of {E} on average"
        case Selection.hash:
            return f"{K} of {E} by a hash of the token"
        case Selection.sinkhorn:
            return f"balanced top-{K} of {E} (sinkhorn)"


def _score(score: Score) -> str:
    return "softmax" if score is Score.softmax else f"{score.name} scores"
