"""Offloaded activations: what leaves the device, when it returns, and which stream waits for which."""

import functools
from typing import Any

import cuda_double
import pytest
import torch
from tokenyard.moe.model import Transformer
from tokenyard.moe.token_info import BatchPosition
from tokenyard.parallel import offload as module
from tokenyard.parallel.apply import initialise, parallelize
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.offload import Offload
from tokenyard.train.config.compose import compose
from torch import Tensor, nn

CPU, DEVICE = torch.device("cpu"), torch.device("cuda", 0)
KEPT = 4
"""Memories that a `Block` keeps."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 256)


@pytest.mark.parametrize("family", ["tiny", "tiny_deepseek_v3", "tiny_longcat_flash", "tiny_qwen3_next"])
def test_gradients_have_the_same_bits(family: str) -> None:
    """Of two micro-batches whose backward passes come after both forward passes."""
    words = [f"model={family}", "model.moe.dropout=0.2"]
    expected, found = (gradients([*words, f"parallel.recompute={kind}"]) for kind in ("none", "offload"))
    assert expected and [name for name in expected if not torch.equal(found[name], expected[name])] == []


def gradients(words: list[str]) -> dict[str, Tensor]:
    config = compose(words)
    with torch.device("meta"):
        model = Transformer(config.model, torch.bfloat16)  # casts of weights are saved too
    parallel = parallelize(model, build_mesh(config.parallel), config.parallel, CPU)
    initialise(parallel, seed=1)
    draw, losses = torch.Generator().manual_seed(0), []
    for micro in range(2):
        logits, stats = model(torch.randint(64, (2, 24), generator=draw), with_stats=True, position=BatchPosition(row=2 * micro))
        losses.append(logits.float().square().mean() + sum(layer.z + layer.scores_BE.square().sum() for layer in stats))
    for loss in reversed(losses):
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Block(nn.Module):
    """Keeps four memories of (16, 32): its input, of which two views are saved, a product before and after its weight, its output.

    The weight and `shared` are saved for the backward pass too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((16, 32), 0.5))

    def forward(self, x: Tensor, shared: Tensor, tokens: Any = None) -> tuple[Tensor, None]:
        rows = x.view(32, 16) * x.view(32, 16)[:, :1]
        return (rows.view(16, 32) * shared * self.weight).sin().exp(), None


class Chain:
    """Blocks after each other, and where what each pass over one keeps is."""

    def __init__(self, blocks: int, device: torch.device = CPU) -> None:
        self.offload, self.passes = Offload(device), list[Any]()
        self.blocks = [Block() for _ in range(blocks)]
        for block in self.blocks:
            self.offload.wrap(block)

    def forward(self, x: Tensor, shared: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x, shared)
            self.passes.append(self.offload.window[-1])
        return x

    def on_device(self) -> list[int]:
        return [sum(memory.on_device is not None for memory in each.copied) for each in self.passes]

    def on_host(self) -> list[int]:
        return [len(each.copied) for each in self.passes]


def test_two_blocks_are_on_the_device_and_each_returns_before_its_backward_pass() -> None:
    """Neither weights nor what all blocks share is copied, and a memory once. At the end the host keeps nothing."""
    chain, shared, seen = Chain(5), torch.rand(16, 32), list[list[int]]()
    x = (torch.rand(16, 32) * 0.1).requires_grad_()
    y = chain.forward(x, shared)
    assert chain.on_host() == [KEPT] * 5
    assert chain.on_device() == [0, 0, 0, KEPT, KEPT]
    for block in chain.blocks:
        block.weight.register_hook(lambda _: seen.append(chain.on_device()))
    y.sum().backward()
    for index, on_device in zip((4, 3, 2, 1, 0), seen, strict=True):
        assert on_device[:index] == ([0] * (index - 1) + [KEPT])[-index:][:index], index
    assert chain.on_host() == [0] * 5
    expected = x.detach().requires_grad_()
    functools.reduce(lambda x, block: Block.forward(block, x, shared)[0], chain.blocks, expected).sum().backward()
    assert x.grad is not None and expected.grad is not None and torch.equal(x.grad, expected.grad)


def test_what_is_small_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", 16 * 32 * 4 + 1)
    chain = Chain(3)
    y = chain.forward(torch.rand(16, 32).requires_grad_(), torch.rand(16, 32))
    assert chain.on_host() == [0] * 3
    y.sum().backward()


def test_a_block_fetches_no_block_of_another_micro_batch() -> None:
    """As in a pipeline, where the next micro-batch goes forward before one goes back. Nothing is kept without a graph."""
    chain, shared = Chain(3), torch.rand(16, 32)
    first, second = (chain.forward(torch.rand(16, 32).requires_grad_(), shared) for _ in range(2))
    assert chain.on_device() == [0] * 4 + [KEPT] * 2
    second.sum().backward()
    assert chain.on_device() == [0] * 6
    assert chain.on_host() == [KEPT] * 3 + [0] * 3
    with torch.no_grad():
        chain.blocks[0](torch.rand(16, 32), shared)
    assert len(chain.offload.window) == 2
    del first
    assert chain.on_host() == [0] * 6


def test_a_graph_may_be_used_twice() -> None:
    chain, x = Chain(4), (torch.rand(16, 32) * 0.1).requires_grad_()
    y = chain.forward(x, torch.rand(16, 32)).sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=not last)[0] for last in (False, True))
    assert torch.equal(first, again)


def test_copies_run_beside_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The double does the work of a stream when somebody waits for it: who waits for too little reads memory that is not filled."""
    cuda = cuda_double.installed(monkeypatch)
    offload, kept, default = Offload(DEVICE), list[Any](), cuda.current_stream(0)
    for index in range(4):
        x = cuda.tensor(torch.full((16, 8), float(index)), 0)
        this = module._BlockPass(kept[-1][0] if kept else None)
        kept.append((this, this.pack(x.T), x.as_subclass(Tensor)))
        offload._copy(this, set())
        if index > 1:
            offload._release(kept[index - 2][0])
            default.give(functools.partial(kept[index - 2][2].fill_, torch.nan))  # others use the memory
    cuda.calls.clear()
    for index in (3, 2, 1, 0):
        found = offload._unpack(kept[index][1])
        default.run(default.given)
        assert found.shape == (8, 16) and found.as_subclass(Tensor).unique().tolist() == [index]
    whats = [call.what for call in cuda.calls]
    assert whats.count("copy to device") == 2 and whats.count("copy") == 0
    assert not {"event.synchronize", "record_stream", "cpu"} & set(whats)
