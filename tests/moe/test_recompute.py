"""Selective recomputation: same bits as without, which operators run again, and what is kept between the two passes."""

from collections import Counter
from typing import Any
from weakref import ref

import pytest
import torch
from tokenyard.moe import recompute as recompute_module
from tokenyard.moe.model import Transformer
from tokenyard.moe.recompute import keep, repeats, selective_contexts
from tokenyard.parallel.apply import initialise, parallelize
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.config.compose import compose
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

FAMILIES = {
    "tiny": "model.moe.capacity.factor=0.7 model.dropout=0.1",
    "tiny_deepseek_v3": "model.moe.dropout=0.2",
    "tiny_gpt_oss": "",
    "tiny_longcat_flash": "",
    "tiny_qwen3_next": "",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_have_the_same_bits(family: str) -> None:
    """Drops and dropout, MLA, biases and sinks, a shortcut and null experts, gated DeltaNet."""
    words = [f"model={family}", *FAMILIES[family].split()]
    (expected, _), (found, _) = (gradients([*words, f"parallel.recompute={kind}"]) for kind in ("none", "selective"))
    assert expected.keys() == found.keys() and expected
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_no_product_of_wide_rows_runs_again() -> None:
    """Of MLA's five products the two that expand latents do; attention, grouped products and the choice of experts do not."""
    counts = {
        kind: gradients(["model=tiny_deepseek_v3", f"parallel.recompute={kind}"])[1] for kind in ("none", "selective", "block")
    }
    layers = compose(["model=tiny_deepseek_v3"]).model.layers
    assert counts["block"]["grouped_mm"] - counts["none"]["grouped_mm"] == 2 * (layers - 1)
    assert counts["selective"]["grouped_mm"] == counts["none"]["grouped_mm"]
    assert counts["selective"]["argmax"] == counts["none"]["argmax"] > 0
    assert counts["selective"]["mm"] - counts["none"]["mm"] == 2 * layers < counts["block"]["mm"] - counts["none"]["mm"]
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    for kind in ("selective", "block"):
        calls = gradients(["model=tiny", f"parallel.recompute={kind}"])[1]
        assert calls[attention] == compose(["model=tiny"]).model.layers * (2 if kind == "block" else 1)


def gradients(words: list[str]) -> tuple[dict[str, Tensor], Counter[str]]:
    """Returns the gradients of one sum, and how often each operator ran forward and backward."""
    config = compose(words)
    with torch.device("meta"):
        model = Transformer(config.model, torch.float64)
    parallel = parallelize(model, build_mesh(config.parallel), config.parallel, torch.device("cpu"))
    initialise(parallel, seed=1)
    ids = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    with OperatorCalls() as ran:
        logits, stats = model(ids, with_stats=True)
        (logits.square().mean() + sum(layer.z + layer.scores_BE.square().sum() for layer in stats)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, ran.calls


class OperatorCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_keep_computes_once_in_a_block_and_always_outside() -> None:
    calls: list[bool] = []

    def double(x: Tensor) -> Tensor:
        calls.append(repeats())
        return x.detach() * 2

    def block(x: Tensor) -> Tensor:
        inner = keep(lambda: keep(lambda: double(x)) + 1)  # the inner one is part of the outer one
        return (x * inner).exp() * keep(lambda: double(inner))

    x = torch.ones(3, requires_grad=True)
    expected = torch.autograd.grad(block(x).sum(), x)[0]
    assert calls == [False] * 2
    y = checkpoint(block, x, use_reentrant=False, context_fn=lambda: selective_contexts(8))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    assert calls == [False] * 4 and not repeats()


def test_an_error_inside_leaves_nothing_behind() -> None:
    def block(x: Tensor) -> Tensor:
        return keep(lambda: 1 // 0 * x)

    with pytest.raises(ZeroDivisionError):
        checkpoint(block, torch.ones(1, requires_grad=True), use_reentrant=False, context_fn=lambda: selective_contexts(8))
    assert recompute_module._this_thread.tape is None


def test_what_is_kept_goes_with_the_graph() -> None:
    """No cycle of references keeps the results until Python's collector runs."""
    kept: list[Any] = []

    def block(x: Tensor) -> Tensor:
        y = x @ x
        kept.append(ref(y.untyped_storage()))
        return y.exp()

    y = checkpoint(block, torch.ones(8, 8, requires_grad=True), use_reentrant=False, context_fn=lambda: selective_contexts(8))
    assert kept[0]() is not None
    del y
    assert kept[0]() is None
