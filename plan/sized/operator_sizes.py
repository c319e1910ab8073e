"""The operators of a model on sizes: what each allocates, saves for the backward pass, and gives back there (autograd.py).

Sizes are elements unless they are called bytes. `Sized` has them as methods, for one rank.
"""

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from .autograd import Backward, Buffer, MemoryMeter, Node, Value

WIDE = 4
"""Bytes of fp32, in which norms, routers and losses compute narrower activations."""
INDEX = 8
"""Bytes of an int64."""


class Casts(Enum):
    """Where weights in the dtype of the activations come from."""

    each = "each"
    """Each use makes one, which the graph keeps."""
    step = "step"
    """One for all micro-batches of a step, and gradients are added as they are (moe/weight_cast.py)."""
    gathered = "gathered"
    """FSDP gathers them, and takes the narrow gradients away when the backward pass of the block ends."""


class Group(NamedTuple):
    """Elements of weights that FSDP gathers together, and whose gradients it reduces together."""

    whole: int = 0
    shards: int = 0
    """Of them, those that a rank holds between steps."""
    last: int = 0
    """The last of the weights. While FSDP reduces the group's gradients it refers to that of this one, for a variable of its loop
    over them lives as long."""
    copied: int = 0
    """The same if it is not sharded in its first dimension: then what is reduced is a copy of its gradient."""

    def joined(self, other: "Group") -> "Group":
        """Returns one group of both, `other` behind."""
        return Group(self.whole + other.whole, self.shards + other.shards, other.last, other.copied) if other.whole else self


class Gathered(NamedTuple):
    """What FSDP gathers of a block: its own weights, and those of its experts, which are a group of their own."""

    dense: Group = Group()
    experts: Group = Group()


class Around(NamedTuple):
    """What FSDP gathers for a block, and for the one that follows it in the forward and in the backward pass."""

    own: Gathered
    after: Gathered
    before: Gathered


class Sized:
    """Operators on one rank. `narrow`, `stored`: bytes of an activation and of a weight. `first`: no gradient exists yet."""

    own = Gathered()
    whole = False
    """Whether FSDP's weights stay gathered (parallel.zero below 3); they are counted elsewhere."""
    gathers = True
    """Whether FSDP gathers in this forward pass: with `whole` in the first one alone."""
    reduces = True
    """Whether FSDP reduces gradients after this micro-batch (not with parallel.zero=1, but after the last)."""
    waited = False
    """Whether FSDP has kept whole gradients of earlier micro-batches, which it reduces after this one."""
    final = False
    """Whether it is the last micro-batch of the step, whose backward pass ends what `whole` keeps."""

    def __init__(self, row: int, narrow: int, stored: int, casts: Casts, of_experts: Casts, first: bool) -> None:
        self.meter, self.row = MemoryMeter(), row
        self.of_experts = of_experts
        self.narrow, self.stored, self.wide = narrow, stored, max(WIDE, narrow)
        self.casts, self.first = casts, first
        self.records = True
        """Whether operators make nodes."""
        self.tape: deque[Buffer] | None = None
        """Results that selective recomputation keeps; None: it is off."""
        self.repeats = False
        """Whether this is the second pass through a block that is recomputed."""
        self.saves = 0
        """Operators that have saved something in the first pass; in the second those that have yet to."""
        self.allocates = True
        """Not in a second pass that has saved all: torch ends it there."""
        self.nodes: list[Node] = []
        """Those of a second pass, in order."""
        self.last_saver = 0
        """The place in `nodes` of the last one that has saved something."""
        self.defers = False
        """Whether products leave the gradients of their weights for later, with what these need in `deferred`."""
        self.deferred: list[Any] = []
        self.deferred_elements: dict[Casts, list[float]] = {casts: [] for casts in Casts}
        """Of the weights whose gradients are left for later, by where they come from."""
        self.named_casts: list[Buffer] = []
        """Casts of weights in a first pass whose graph names them, as gradients are left for them."""
        self.travels, self.flat, self.dense, self.experts, self.reduced, self.waiting = (list[Buffer]() for _ in range(6))
        self.sharded = list[Buffer]()
        """Gradients that FSDP has reduced."""
        self.dropped = list[Buffer]()
        self.gradients: list[Buffer] = []
        """Of weights, in their dtype; with FSDP whole and narrow, until the block ends."""
        self.root_gradients: dict[str, Buffer] = {}
        """The same of embedding, head and what is around the blocks."""
        self.shared_root = set[str]()
        """Those of them that wait for the gradient of the first layer's input, which has the same weight."""
        self.expert_gradients: list[Buffer] = []
        """The same of experts, which FSDP reduces before."""

    def bytes(self, size: float) -> Buffer:
        """Allocates `size` bytes."""
        return Buffer(self.meter, round(size) if self.allocates else 0)

    def new(self, elements: float) -> Buffer:
        """Allocates activations."""
        return self.bytes(self.narrow * elements)

    def saved(self) -> None:
        """An operator saves tensors for the backward pass. torch's own do so before they run, autograd functions after.

        Operators that cannot be the last of a block to do so need not call it.
        """
        self.saves += -1 if self.repeats else 1
        if self.repeats and self.saves == 0:
            self.allocates, self.last_saver = False, len(self.nodes)

    def value(self, buffer: Buffer, inputs: Sequence[Value | None], backward: Backward) -> Value:
        """Returns the output of an operator with these differentiable inputs."""
        if not self.records:
            return Value(buffer)
        node = Node(self.meter, [x.node if x is not None else None for x in inputs], backward)
        if self.repeats:
            self.nodes.append(node)
        return Value(buffer, node)

    def keep(self, make: Callable[[], Buffer]) -> Buffer:
        """Returns make(), or in a second pass what it gave in the first: `moe/recompute.py`."""
        if self.tape is None or not self.allocates:
            return make()
        if self.repeats:
            return self.tape.popleft()
        self.tape.append(result := make())
        return result

    # Weights.

    def weight(self, name: str, elements: float, cast: bool = True) -> Value:
        """Returns a weight in the dtype of the activations. Without `cast` operators take it as it is stored."""
        casts = self.casts_of(name)
        if casts is Casts.gathered or not cast or self.stored == self.narrow:
            return Value(self.bytes(0), self._accumulate(name) if self.records else None)
        size = 0 if casts is Casts.step else elements  # those of a step are counted elsewhere
        buffer = self.labelled("weight casts", lambda: self.new(size))
        leaf = self._accumulate(name) if self.records else None
        if self.defers and not self.records:
            self.named_casts.append(buffer)
        return self.value(buffer, [Value(buffer, leaf)], lambda _: [self._widened(elements, casts)])

    def casts_of(self, name: str) -> Casts:
        """Experts may be whole where other weights are gathered."""
        return self.of_experts if name.startswith("experts.") else self.casts

    def _widened(self, elements: float, casts: Casts) -> Buffer | None:
        """The gradient in the dtype of the weight; the step's casts add to one that exists without a wide copy."""
        if casts is Casts.step and not self.first:
            return None
        return self.labelled("gradients", lambda: self.bytes(self.stored * elements))

    def _accumulate(self, name: str) -> Node:
        def add(gradient: Buffer) -> list[Buffer | None]:
            if name == "projection":  # of multi-token prediction, outside of its block
                self.keep_root(name, gradient)
            elif self.first or self.casts_of(name) is Casts.gathered:
                (self.expert_gradients if name.startswith("experts.") else self.gradients).append(gradient)
            return []

        node = Node(self.meter, [], add)
        node.order += 1 << 40  # torch runs these first
        return node

    def labelled(self, label: str, make: Callable[[], Buffer]) -> Buffer:
        before, self.meter.label = self.meter.label, label
        buffer = make()
        self.meter.label = before
        return buffer

    def keep_root(self, name: str, gradient: Buffer) -> None:
        """Keeps the gradient of a weight outside of blocks: unless one exists that it is added to."""
        if self.first or self.casts is Casts.gathered or name in self.shared_root:
            self.root_gradients.setdefault(name, gradient).relabel("gradients")

    # FSDP. A gather has a flat buffer, which lives until the next one is copied out, and the weights. A reduction has a flat buffer
    # in the dtype of the stored weights, which lives until the next reduction begins.

    def gather_block(self, own: Gathered, following: Gathered, backward: bool = False) -> None:
        """The weights of a block are gathered; those of its experts and of the following block are under way.

        In the backward pass a flat buffer ends when it has been copied out.
        """
        self.own = own
        if self.whole and (backward or not self.gathers):
            return
        self.travels = [self._gathered(group.whole) for group in (own.experts, following.dense, following.experts)]
        self.flat, self.dense = [self._gathered(own.dense.whole)], [self._gathered(0 if self.whole else own.dense.whole)]
        if backward:
            self.flat.clear()

    def gather_experts(self) -> None:
        """The weights of the experts are copied out of their flat buffer."""
        if self.own.experts.whole and self.travels and not self.experts and self.allocates:
            self.experts = [self._gathered(0 if self.whole else self.own.experts.whole)]
            self.flat, self.travels = self.travels[:1], self.travels[1:]

    def _gathered(self, elements: float) -> Buffer:
        return self.labelled("gathered by FSDP", lambda: self.new(elements))

    def release_block(self) -> None:
        """The forward pass of a block ends: weights are not gathered any more. The last flat buffer lives until the next gather."""
        for buffers in (self.travels, self.dense, self.experts):
            buffers.clear()

    def begin_stage(self, root: Group, following: Gathered) -> None:
        """The root module has gathered its weights, and asked for those of the first block."""
        if self.gathers:
            self.flat, self.travels = [self._gathered(root.whole)], [self._gathered(group.whole) for group in following]

    def behind_block(self, last: Gathered) -> None:
        """The block before, or the root module if there is none, has gathered these weights."""
        if self.gathers:
            self.flat = [self._gathered(last.experts.whole or last.dense.whole)]

    def enter_experts(self, x: Value) -> Value:
        """The experts of the block are gathered. Backward, their gradients are reduced here."""
        if self.casts is not Casts.gathered or not self.own.experts.whole:
            return x
        group = self.own.experts
        self.gather_experts()
        if self.repeats and self.allocates:
            self.flat.clear()

        def backward(gradient: Buffer) -> list[Buffer | None]:
            self.experts.clear()
            self.reduce_gradients(group, self.expert_gradients)
            return [gradient]

        return self.value(x.buffer, [x], backward)

    def leave_experts(self) -> None:
        """After the forward pass the experts are not gathered, unless the backward pass follows at once."""
        if not self.repeats:
            self.experts.clear()

    def reduce_gradients(self, group: Group, gradients: list[Buffer]) -> None:
        """What FSDP does with the whole gradients of a group: it packs them into a flat buffer, frees them, and makes the shards.

        Shards to which later micro-batches add stay. Gradients that wait for the last micro-batch have the dtype of the weights;
        they are widened one after the other, and later ones are added in place.
        """
        if self.whole and self.final:
            self.dropped.append(self._gathered(-group.whole))  # weights that were counted where they were gathered
        size = self.stored if self.waited else self.narrow
        if self.waited:
            gradients.clear()
        if self.reduces:
            self.reduced.clear()
            copy = self.bytes(size * group.copied)
            self.reduced.append(self.labelled("reduced by FSDP", lambda: self.bytes(self.stored * group.whole)))
            del copy
        elif self.defers or not self.first:
            gradients.clear()
            return
        gradients.clear()
        if self.waited:  # those that were counted where they were widened
            self.dropped.append(self._of_gradients(-self.stored * group.whole))
        last = self._of_gradients(size * group.last)
        made = self._of_gradients(self.stored * (group.shards if self.reduces else group.whole))
        del last
        if not self.reduces:
            self.waiting.append(made)
        elif self.first or self.waited:
            self.sharded.append(made)

    def _of_gradients(self, size: float) -> Buffer:
        return self.labelled("gradients", lambda: self.bytes(size))

    # Products, norms, element-wise operators.
    def linear(self, x: Value, name: str, rows: float, inputs: float, outputs: float, width: float = 0) -> Value:
        """rows x inputs to rows x outputs. Rows of `width` numbers or more are kept by selective recomputation; 0: never."""
        weight, saved = self.weight(name, inputs * outputs), x.buffer
        self.saved()
        product = self.keep(lambda: self.new(rows * outputs)) if width and inputs >= width else self.new(rows * outputs)
        held = [saved, weight.buffer]

        def backward(gradient: Buffer) -> list[Buffer | None]:
            grads: list[Buffer | None] = [self.new(rows * inputs), None]
            if self.defers:
                self.deferred.append((gradient, *held))
                if name != "projection":  # it is outside of its block, with embedding and head
                    self.deferred_elements[self.casts_of(name)].append(inputs * outputs)
            else:
                grads[1] = self.new(inputs * outputs)
            held.clear()
            return grads

        return self.value(product, [x, weight], backward)

    def norm(self, x: Value, elements: float, rows: float) -> Value:
        """RMSNorm as the kernel of a GPU: saves its input and the inverse root of each row."""
        held, out = [x.buffer], self.new(elements)
        held.append(self.bytes(self.wide * rows))
        self.saved()

        def backward(_: Buffer) -> list[Buffer | None]:
            grad = self.new(elements)
            held.clear()
            return [grad]

        return self.value(out, [x], backward)

    def unary(self, x: Value, before: float, after: float, saves: str = "") -> Value:
        """before elements to after. `saves`: x, or y, the result; empty: nothing."""
        out = self.new(after)
        held = [x.buffer] if saves == "x" else [out] if saves == "y" else []

        def backward(_: Buffer) -> list[Buffer | None]:
            grad = self.new(before)
            held.clear()
            return [grad]

        return self.value(out, [x], backward)

    def add(self, x: Value, y: Value, elements: float) -> Value:
        return self.value(self.new(elements), [x, y], lambda gradient: [gradient, gradient])
