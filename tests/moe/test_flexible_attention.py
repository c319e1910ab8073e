"""Attention by blocks equals attention with masks, in fp64 on the CPU; its blocks are those of the mask itself, and few."""

import itertools
from typing import Any

import pytest
import torch
from tokenyard.moe import attention as attention_module
from tokenyard.moe import flexible_attention as module
from tokenyard.moe.attention import Attention, KeyValueCache, attend, attention_mask, fused_attention
from tokenyard.moe.config import AttentionConfig, ModelConfig
from tokenyard.moe.flexible_attention import BLOCK, attend_with_blocks, block_mask, block_masks
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.rotary import rotary_tables
from tokenyard.moe.softmax import Softmax
from tokenyard.train.config.compose import compose
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

CPU, SEQUENCES, LENGTH, HEADS = torch.device("cpu"), 2, 300, 4
GROUPS_AND_WIDTHS = {"multi-head": (4, 20, 20), "grouped": (2, 20, 20), "latent": (4, 24, 16), "narrow": (1, 6, 5)}
DOCUMENTS = {
    "none": [],
    "one": [LENGTH],
    "some": [1, 27, 100, 1, 1, 153, 17],
    "of a token": [1] * LENGTH,
    "of a block": [128, 128, 44],
}


@pytest.fixture(autouse=True)
def _gradients_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows the unfused CPU kernels, which torch has but refuses to run."""
    monkeypatch.setattr(torchs, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("documents", ["none", "some"])
@pytest.mark.parametrize("shape", GROUPS_AND_WIDTHS.values(), ids=GROUPS_AND_WIDTHS)
def test_same_outputs_and_gradients(
    sinks: bool, softcap: float | None, window: int | None, documents: str, shape: tuple[int, int, int]
) -> None:
    softmax, documents_BS = Softmax(0.3, softcap, window), numbered(documents)
    tensors = random_heads(shape, sinks)
    expected = attend(*tensors[:3], softmax, tensors[3], documents_BS)
    blocks = block_mask(LENGTH, window, CPU, documents_BS)
    assert_same(attend(*tensors[:3], softmax, tensors[3], documents_BS, blocks), expected, tensors)


@pytest.mark.parametrize("documents", ["one", "of a token", "of a block"])
@pytest.mark.parametrize("window", [None, 1, 200])
def test_documents_of_every_length(window: int | None, documents: str) -> None:
    softmax, documents_BS, tensors = Softmax(0.3, None, window), numbered(documents), random_heads((2, 20, 20), True)
    expected = attend(*tensors[:3], softmax, tensors[3], documents_BS)
    blocks = block_mask(LENGTH, window, CPU, documents_BS)
    assert_same(attend_with_blocks(*tensors[:3], softmax, tensors[3], blocks), expected, tensors)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300, 512])
@pytest.mark.parametrize("window", [None, 1, 2, 100, 128, 129, 200, 257])
def test_blocks_are_those_of_the_mask(length: int, window: int | None) -> None:
    """The blocks have the order and layout that torch computes from all (S, S) pairs."""
    for documents in (None, *(numbered(name, length) for name in DOCUMENTS if name != "none")):
        ours, seen = block_mask(length, window, CPU, documents), attention_mask(length, length, window, CPU, documents)
        seen_BSS = seen.expand(1, 1, length, length)[:, 0] if documents is None else seen[:, 0]
        theirs = create_block_mask(
            lambda b, h, q, k, of=seen_BSS: of[b, q, k], len(seen_BSS), 1, length, length, device="cpu", BLOCK_SIZE=BLOCK
        )
        for name in ("num_blocks", "indices"):
            for kind in ("kv_", "q_", "full_kv_", "full_q_"):
                found = getattr(ours, kind + name)
                assert found.is_contiguous() and torch.equal(found, getattr(theirs, kind + name))


@pytest.mark.parametrize("new", [1, 100, 128, 200])
@pytest.mark.parametrize("window", [None, 1, 128, 200])
@pytest.mark.parametrize("documents", ["none", "some"])
def test_the_last_tokens_as_queries(new: int, window: int | None, documents: str) -> None:
    """As with context parallelism: chunks begin anywhere in a block."""
    length = LENGTH - 60
    documents_BS = numbered(documents)
    documents_BS = None if documents_BS is None else documents_BS[:, :length]
    q, k, v, _ = random_heads((2, 20, 20), False)
    tensors = [x.detach()[:, :, -rest:].requires_grad_() for x, rest in ((q, new), (k, length), (v, length))]
    softmax = Softmax(0.3, None, window)
    expected = attend(*tensors, softmax, None, documents_BS)
    blocks = block_mask(length, window, CPU, documents_BS, length - new)
    assert blocks.seq_lengths == (new, length)
    assert_same(attend(*tensors, softmax, None, documents_BS, blocks), expected, tensors)


def test_masked_blocks_are_skipped() -> None:
    """A window of 512 tokens needs at most 5 of 64 blocks in a row; 16 documents of 4 blocks need 10 pairs each."""
    length = 64 * BLOCK
    documents_BS = torch.arange(length).unsqueeze(0) // (4 * BLOCK)
    assert pairs(block_mask(length, None, CPU)) == 64 * 65 // 2
    assert pairs(block_mask(length, 4 * BLOCK, CPU)) == 5 * 64 - (1 + 2 + 3 + 4)
    assert pairs(block_mask(length, None, CPU, documents_BS)) == 16 * 10
    assert pairs(block_mask(length, BLOCK, CPU, documents_BS)) == 16 * 7
    assert pairs(block_mask(length, None, CPU, None, length // 2)) == 32 * 32 + 32 * 33 // 2


def test_no_tensor_has_a_number_for_each_pair_of_tokens() -> None:
    length = 512 * BLOCK
    with Largest() as largest:
        block_mask(length, 4 * BLOCK, CPU, torch.zeros(2, length, dtype=torch.int64))
    assert largest.elements == 2 * (length // BLOCK) ** 2


def test_which_kinds_of_layer_have_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids_BS, documents_BS = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int64)

    def kinds(documents: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> list[bool]:
        return list(block_masks(ModelConfig(layers=2, attention=AttentionConfig(**settings)), ids_BS, dtype, documents))

    assert kinds(sinks=True) == []
    monkeypatch.setattr(module, "kind_of", lambda x: "cuda")
    assert kinds() == kinds(window=8) == kinds(sinks=True, dtype=torch.float64) == []
    assert kinds(window=7) == kinds(window=8, softcap=1.0) == [True]
    assert kinds(window=7, window_every=2) == [True]
    assert kinds(sinks=True) == kinds(softcap=1.0) == kinds(documents_BS) == [False]
    assert kinds(documents_BS, window=7, window_every=2) == [False, True]


@pytest.mark.parametrize("preset", ["tiny_gpt_oss", "tiny_grok", "tiny_deepseek_v3", "tiny_mixtral"])
def test_a_model_makes_its_blocks_once(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses fused kernels only, as on CUDA; generation with a cache does not."""
    model = Transformer(compose([f"model={preset}"]).model, torch.float32)
    initialise(model, 1)
    ids_BS = torch.randint(0, 200, (2, 150), generator=torch.Generator().manual_seed(1))
    documents_BS = torch.arange(150).repeat(2, 1) // 60
    with torch.no_grad():
        expected, cached = model.eval()(ids_BS, documents_BS=documents_BS), model(ids_BS, cache=caches(model))
    made: list[int | None] = []
    monkeypatch.setattr(module, "kind_of", lambda x: "cuda")
    monkeypatch.setattr(
        module, "block_mask", lambda length, window, *rest: made.append(window) or block_mask(length, window, *rest)
    )
    monkeypatch.setattr(attention_module, "attention_mask", None)
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BS, documents_BS=documents_BS), expected, rtol=1e-4, atol=1e-4)
    assert made == ([None, 16] if preset == "tiny_gpt_oss" else [None])
    monkeypatch.undo()
    monkeypatch.setattr(module, "kind_of", lambda x: "cuda")
    monkeypatch.setattr(module, "block_mask", None)
    with torch.no_grad():
        assert torch.equal(model(ids_BS, cache=caches(model)), cached)


def test_all_layers_and_micro_batches_share_what_is_compiled() -> None:
    """Two kinds of layer and three micro-batches with different documents, under activation checkpointing."""
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(module._attend, fullgraph=True, backend=counter)
    for documents, layer in itertools.product(("one", "some", "of a block"), range(4)):
        documents_BS, window = numbered(documents), 70 if layer % 2 else None
        softmax, tensors = Softmax(0.3, 1.5, window), random_heads((2, 20, 20), False)
        blocks = block_mask(LENGTH, window, CPU, documents_BS)
        within_a_model = [x * 1 for x in tensors[:3]]  # no leaves of the graph
        y_BHSh: Any = checkpoint(run, *within_a_model, softmax, None, blocks, use_reentrant=False)
        assert_same(y_BHSh, attend(*tensors[:3], softmax, None, documents_BS), tensors)
    assert counter.frame_count == 2


def test_inside_of_a_compiled_attention_layer() -> None:
    config = ModelConfig(
        width=24, heads=4, kv_heads=2, attention=AttentionConfig(softcap=1.5, sinks=True, window=70, window_every=2)
    )
    x_BSD, documents_BS = torch.randn(2, LENGTH, 24), numbered("some")
    plain = rotary_tables(config, 0, LENGTH, CPU, torch.float32, documents_BS)
    rotary = plain._replace(
        blocks={False: block_mask(LENGTH, None, CPU, documents_BS), True: block_mask(LENGTH, 70, CPU, documents_BS)}
    )
    counter = CompileCounterWithBackend("aot_eager")
    for index in range(6):
        layer = Attention(config, torch.float32, index)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        expected = layer(x_BSD, plain)
        layer.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(layer(x_BSD, rotary), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_attention_in_the_shapes_of_cudas_kernels(cudnn: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding values for flash attention, and repeating heads for the fp32 kernel, changes no bits."""
    monkeypatch.setattr(attention_module, "_by_cudnn", lambda *widths: cudnn)
    for shape in GROUPS_AND_WIDTHS.values():
        tensors = [x.detach().to(dtype).requires_grad_() for x in random_heads(shape, False)[:3]]
        expected = fused_attention(*tensors, 0.3, None, True)
        monkeypatch.setattr(attention_module, "kind_of", lambda x: "cuda")
        k, v = attention_module._prepare_keys_and_values(*tensors)
        assert k.shape[1] == v.shape[1] == (HEADS if dtype == torch.float32 else shape[0])
        assert v.shape[-1] == (shape[2] if cudnn or dtype == torch.float32 else shape[1])
        assert_same(fused_attention(*tensors, 0.3, None, True), expected, tensors, 1e-12 if dtype == torch.float64 else 1e-5)
        monkeypatch.setattr(attention_module, "kind_of", lambda x: "cpu")


class Largest(TorchDispatchMode):
    """Records the largest tensor that an operator creates."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in tensors)])
        return made


def numbered(documents: str, length: int = LENGTH) -> Tensor | None:
    """Two sequences, the second with the documents in reverse order."""
    lengths = torch.tensor(DOCUMENTS[documents], dtype=torch.int64)
    if not len(lengths):
        return None
    sequences = [torch.repeat_interleave(torch.arange(len(lengths)), each) for each in (lengths, lengths.flip(0))]
    return torch.stack([torch.cat([row, torch.full((length,), len(lengths))])[:length] for row in sequences])


def random_heads(shape: tuple[int, int, int], sinks: bool) -> list[Any]:
    """Returns queries, keys, values and sinks (or None)."""
    groups, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (SEQUENCES, HEADS, LENGTH, width),
        (SEQUENCES, groups, LENGTH, width),
        (SEQUENCES, groups, LENGTH, value_width),
        (HEADS,),
    ]
    tensors = [torch.randn(each, dtype=torch.float64, generator=generator).requires_grad_() for each in shapes]
    return tensors if sinks else [*tensors[:3], None]


def assert_same(y: Tensor, expected: Tensor, tensors: list[Any], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    inputs = [x for x in tensors if x is not None]
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), inputs)
    for gradient, other in zip(gradients, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other, rtol=0, atol=tolerance * other.abs().max().clamp(min=1).item())


def pairs(blocks: Any) -> int:
    """Returns the number of pairs of blocks that are computed."""
    return int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())


def caches(model: Transformer) -> list[KeyValueCache]:
    return [KeyValueCache() for _ in model.layers]
