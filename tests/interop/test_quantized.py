"""Quantized folders against transformers' own dequantization, by rectangles, in little memory; others are refused by name."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from family_cases import MLA
from quantize import quantize
from safetensors.torch import load_file, save_file
from tokenyard.checkpoint.saver import Saver
from tokenyard.checkpoint.store import read_whole
from tokenyard.interop import quantized
from tokenyard.interop.config_mapping import read_config
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.load_weights import open_source, read_shards, read_weights
from tokenyard.launch.main import main
from tokenyard.parallel.shard import LocalShard, whole
from torch import Tensor

from .test_read_shards import filled, rectangle
from .test_train_from_weights import configured, opened

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 96, "intermediate_size": 64, "head_dim": 24}
DEEPSEEK = {**MLA, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "num_attention_heads": 4}
EVEN = {**DEEPSEEK, "hidden_size": 256, "intermediate_size": 384, "moe_intermediate_size": 128, "kv_lora_rank": 120}
"""Widths of at most 128, or multiples: transformers takes a block to be the width over the number of blocks."""
UNEVEN = {**DEEPSEEK, "hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 136, "kv_lora_rank": 130}


@pytest.fixture
def made(build: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`made("GptOss", MXFP4, hidden_size=96)`: the folder of a quantized model."""

    def make(family: str, about: dict[str, Any], **settings: Any) -> Path:
        build(family, **settings).bfloat16().save_pretrained(tmp_path / "theirs")
        return quantize(tmp_path / "theirs", about)

    return make


CASES = {"mxfp4": ("GptOss", MXFP4, GPT_OSS), "fp8": ("DeepseekV3", FP8, EVEN)}


@pytest.mark.parametrize("name", CASES)
def test_bit_for_bit_as_transformers_dequantizes(
    name: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.quantizers import quantizer_finegrained_fp8

    family, about, settings = CASES[name]
    theirs = made(family, about, vocab_size=264, **settings)
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)  # which dequantizing does not use
    method = transformers.Mxfp4Config if name == "mxfp4" else transformers.FineGrainedFP8Config
    expected = transformers.AutoModelForCausalLM.from_pretrained(
        theirs, dtype=torch.bfloat16, quantization_config=method(dequantize=True), attn_implementation="eager"
    )
    import_folder(theirs, tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "again")
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in described and described["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    found, wanted = again.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    stored = {key: each.dtype for key, each in load_file(next((tmp_path / "again").glob("*.safetensors"))).items()}
    assert {dtype for key, dtype in stored.items() if not key.endswith("correction_bias")} == {torch.bfloat16}
    ids = torch.arange(2 * 19).view(2, 19) * 7 % 48
    torch.testing.assert_close(tokenyard.load_model(theirs)(ids), expected.float()(ids).logits, rtol=0, atol=2e-4)


def view(kind: Any, values: Tensor, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    return kind(values, scales)[tuple(slice(0, size) for size in shape)]


def test_every_number_with_every_exponent_of_mxfp4() -> None:
    pytest.importorskip("transformers")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 16).contiguous()
    expected = convert_moe_packed_tensors(blocks, scales)
    assert expected.shape == (1, 512, 255) and len(expected.unique()) > 1000
    assert torch.equal(view(quantized.Mxfp4View, blocks, scales, (1, 512, 255)), expected)


@pytest.mark.parametrize("shape", [(128, 256), (130, 260), (1, 385), (576, 64), (2, 200, 131), (3, 128, 127)])
def test_blocks_that_the_width_does_not_fill(shape: tuple[int, ...]) -> None:
    """As in transformers' backward pass, in fp32 before rounding: its loader refuses such widths or cuts them otherwise."""
    pytest.importorskip("transformers")
    from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

    draw = torch.Generator().manual_seed(1)
    values = (torch.randn(shape, generator=draw) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand((*shape[:-2], *(math.ceil(size / 128) for size in shape[-2:])), generator=draw) + 0.01
    expected = _dequantize_fp8_weight(values, scales, [128, 128], torch.float32)
    assert torch.equal(view(quantized.Fp8View, values, scales, shape), expected.bfloat16())


RECTANGLES = {**CASES, "fp8, uneven": ("DeepseekV3", FP8, UNEVEN)}


class Counting:
    """A slice of an open file, which counts the numbers that are read."""

    def __init__(self, part: Any, name: str, read: dict[str, int]) -> None:
        self.part, self.name, self.read = part, name, read

    def __getitem__(self, index: Any) -> Tensor:
        found = self.part[index]
        self.read[self.name] = self.read.get(self.name, 0) + found.numel()
        return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many numbers of each stored tensor were read."""
    counts: dict[str, int] = {}
    open_file = quantized.open_file

    @contextmanager
    def counted(path: Path) -> Iterator[Any]:
        with open_file(path) as file:
            yield type("File", (), {"get_slice": lambda self, name: Counting(file.get_slice(name), name, counts)})()

    monkeypatch.setattr(quantized, "open_file", counted)
    return counts


@pytest.mark.parametrize("name", RECTANGLES)
def test_any_rectangle_is_that_of_the_whole_tensor(name: str, made: Callable[..., Path]) -> None:
    import random

    family, about, settings = RECTANGLES[name]
    source, draw = open_source(made(family, about, **settings)), random.Random(0)
    expected = read_weights(source)
    for _ in range(12):
        shards = {name: rectangle(tuple(t.shape), draw) for name, t in expected.items()}
        for name, tensor in filled(source, shards, complete=False).items():
            assert torch.equal(tensor, shards[name].cut(expected[name]).double()), (name, shards[name])


def test_a_rank_reads_the_groups_of_its_rectangles_alone(made: Callable[..., Path], read: dict[str, int]) -> None:
    """Experts and rows exactly; columns in groups of 32 that share an exponent (mxfp4), exactly (fp8)."""
    source = open_source(made("GptOss", MXFP4, **GPT_OSS))
    gate_up, down = "layers.0.moe.experts.gate_up", "layers.0.moe.experts.down"
    one_expert = {name: whole(source.ours[name].shape).chunk(0, 4, 2) for name in (gate_up, down)}
    filled(source, one_expert, complete=False)
    stored = "model.layers.0.mlp.experts.gate_up_proj"
    assert read[f"{stored}_blocks"] == 128 * 96 // 2 and read[f"{stored}_scales"] == 128 * 3
    read.clear()
    half = {gate_up: whole(source.ours[gate_up].shape).chunk(3, 2, 1)}  # 48 of 96 columns are in 2 of 3 groups
    filled(source, half, complete=False)
    assert read == {f"{stored}_blocks": 4 * 128 * 64 // 2, f"{stored}_scales": 4 * 128 * 2}


def test_a_rank_reads_its_rectangles_of_fp8_alone(made: Callable[..., Path], read: dict[str, int]) -> None:
    source = open_source(made("DeepseekV3", FP8, **UNEVEN))
    quarter = {name: whole(t.shape).chunk(0, 4, 1) for name, t in source.ours.items()}
    quarter = {name: shard for name, shard in quarter.items() if math.prod(shard.sizes)}
    filled(source, quarter, complete=False)
    scales = sum(count for name, count in read.items() if name.endswith("_scale_inv"))
    assert sum(read.values()) - scales == sum(math.prod(shard.sizes) for shard in quarter.values()) and scales > 50


@pytest.mark.parametrize("name", RECTANGLES)
def test_four_ranks_start_from_the_bits_of_the_import(name: str, made: Callable[..., Path], ranks: Any, tmp_path: Path) -> None:
    family, about, settings = RECTANGLES[name]
    theirs = made(family, about, vocab_size=264, **settings)
    expected = read_whole(import_folder(theirs, tmp_path / "ours").checkpoint)
    assert expected["layers.1.moe.experts.down"].dtype is torch.bfloat16
    config = configured(theirs, tmp_path / "run", "parallel.expert=2", "parallel.tensor=2")
    found = ranks(4, opened, config)[0]
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key].float()) for key, tensor in found.items())


LARGE = {
    "mxfp4": (
        "GptOss",
        MXFP4,
        {**GPT_OSS, "num_hidden_layers": 3, "num_local_experts": 32, "hidden_size": 256, "intermediate_size": 256},
    ),
    "fp8": ("DeepseekV3", FP8, {**EVEN, "num_hidden_layers": 4, "n_routed_experts": 32, "hidden_size": 512}),
    "fp8, dense": ("Qwen3", FP8, {"hidden_size": 512, "intermediate_size": 2500, "head_dim": 64, "vocab_size": 5000}),
}


@pytest.mark.parametrize("name", LARGE)
def test_an_import_holds_at_most_two_of_the_largest_tensors(
    name: str, made: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the allocations of torch in the thread that reads and writes; numpy and safetensors have none, files are mapped."""
    family, about, settings = LARGE[name]
    theirs = made(family, about, **settings)
    source = open_source(theirs)
    largest = max(2 * tensor.numel() for tensor in source.ours.values())
    assert 2.5 * largest < sum(2 * tensor.numel() for tensor in source.ours.values())
    peaks, write = [], Saver._write
    monkeypatch.setattr(Saver, "_write", lambda *job: peaks.append(peak(theirs, lambda: write(*job))))
    import_folder(theirs, tmp_path / "ours")
    assert largest <= peaks[0] <= 2 * largest, (peaks[0] / largest, largest)
    held = {name: LocalShard(whole(t.shape), torch.empty(t.shape)) for name, t in source.ours.items()}
    assert peak(theirs, lambda: read_shards(source, held)) <= largest  # the shards are there before


def peak(folder: Path, call: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at a time during the call, beyond what it held before.

    The profiler also reports files of `folder` as they are mapped, which takes no memory.
    """
    mapped = {file.stat().st_size for file in folder.iterdir()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 20
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += 0 if abs(event.nbytes()) in mapped else event.nbytes()
        most = max(most, held)
    return most


OTHERS: list[tuple[str, Any, str]] = [
    ("Llama", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    ("Llama", {"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
    ("Llama", {"quant_method": "awq"}, "quant_method='awq'"),
    ("Llama", {"quant_method": "compressed-tensors"}, "quant_method='compressed-tensors'"),
    ("Llama", {"load_in_8bit": True}, "quant_method=None"),
    ("Llama", "int4", "quant_method='int4'"),
    ("Llama", {"quant_method": ["fp8"]}, "quant_method=['fp8']"),
    ("DeepseekV3", {"quant_method": "fp8"}, "quant_method='fp8' with weight_block_size=None"),
    ("DeepseekV3", FP8 | {"weight_block_size": [64, 128]}, "quant_method='fp8' with weight_block_size=[64, 128]"),
    ("Mixtral", MXFP4, "quant_method='mxfp4'"),
]


@pytest.mark.parametrize(("family", "about", "says"), OTHERS, ids=[says for *_, says in OTHERS])
def test_other_quantization_is_refused_by_its_method(family: str, about: Any, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_config({"architectures": [f"{family}ForCausalLM"], "quantization_config": about})
    assert str(caught.value) == (
        f"config.json: quantization_config.{says}: must be 'fp8' with weight_block_size=[128, 128], or 'mxfp4' of "
        "GptOssForCausalLM; other weights must be bf16, fp16, fp32 or fp64"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"fmt": "e5m2"}, "fmt='e5m2': must be None or 'e4m3' or 'float8_e4m3fn'"),
        ({"activation_scheme": "static"}, "activation_scheme='static': must be None or 'dynamic'"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4': must be None or 'fp8'"),
        ({"group_size": 32}, "group_size=32: is not supported"),
    ],
)
def test_other_settings_of_fp8_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_config({"architectures": ["DeepseekV3ForCausalLM"], "quantization_config": FP8 | change})
    assert str(caught.value) == f"config.json: quantization_config.{says}"


def rewrite(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            save_file(tensors if changed is None else tensors | {name: changed.contiguous()}, file)
    weight_map = {key: file.name for file in folder.glob("*.safetensors") for key in load_file(file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


DAMAGES: list[tuple[str, str, Callable[[Tensor], Tensor | None], str]] = [
    ("mxfp4", "experts.gate_up_proj_scales", lambda t: t[:, 1:], "gate_up_proj_blocks' of U8 (4, 128, 3, 16) with scales of U8"),
    ("mxfp4", "experts.gate_up_proj_blocks", lambda t: t.int(), "gate_up_proj_blocks' of I32 (4, 128, 3, 16) with scales of U8"),
    ("mxfp4", "experts.down_proj_scales", lambda _: None, "experts.down_proj is missing"),
    ("fp8", "self_attn.o_proj.weight_scale_inv", lambda t: t[:1], "of F32 (1, 1): must be of F32, BF16, F16 and (2, 1)"),
    ("fp8", "self_attn.o_proj.weight_scale_inv", lambda t: t.long(), "of I64 (2, 1): must be of F32, BF16, F16 and (2, 1)"),
    ("fp8", "self_attn.o_proj.weight_scale_inv", lambda _: None, "self_attn.o_proj.weight is of type F8_E4M3: must be one of F64"),
    ("fp8", "self_attn.o_proj.weight", lambda t: t[:100], "must be of F32, BF16, F16 and (1, 1), one number for each 128 x 128"),
    ("fp8", "self_attn.o_proj.weight", lambda t: t.bfloat16(), "self_attn.o_proj.weight_scale_inv of shape (2, 1) has no place"),
]


@pytest.mark.parametrize(("name", "tensor", "change", "says"), DAMAGES, ids=[says for *_, says in DAMAGES])
def test_scales_that_do_not_fit_are_refused_in_one_line(
    name: str, tensor: str, change: Callable[[Tensor], Tensor | None], says: str, made: Callable[..., Path]
) -> None:
    family, about, settings = CASES[name]
    folder = made(family, about, **settings)
    prefix = "model.layers.1.mlp." if "experts" in tensor else "model.layers.1."
    rewrite(folder, prefix + tensor, change)
    with pytest.raises(ValueError) as caught:
        open_source(folder)
    assert str(caught.value).startswith(f"{folder}: ") and says in str(caught.value) and "\n" not in str(caught.value)


def test_the_bar_of_an_import_is_shown_on_a_terminal_alone(
    made: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    theirs = made("GptOss", MXFP4, **GPT_OSS)
    calls: list[tuple[int, int]] = []
    import_folder(theirs, tmp_path / "counted", progress=lambda *numbers: calls.append(numbers))
    total = sum(tensor.numel() for tensor in open_source(theirs).ours.values())
    assert calls == sorted(calls) and calls[-1] == (total, total) and len(calls) == len(open_source(theirs).ours)
    assert main(["import", str(theirs), str(tmp_path / "quiet")]) == 0
    out, error = capsys.readouterr()
    assert "of the weights" not in out + error and "tokenyard: 4 tensors of mxfp4 are bf16 now\n" in error
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["import", str(theirs), str(tmp_path / "shown")]) == 0
    out, error = capsys.readouterr()
    assert "100%" in error and "of the weights" in error and out.count("\n") == 1
