"""Quantizes the folders of tiny models as published ones are."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenyard.interop.quantized import E2M1
from torch import Tensor


def to_mxfp4(weight_ECR: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of the nearest numbers."""
    groups = weight_ECR.mT.unflatten(-1, (-1, 32)).float()
    exponents = (groups.abs().amax(-1) / 6).clamp(min=2.0**-100).log2().ceil()
    nibbles = (groups / exponents.exp2()[..., None])[..., None].sub(E2M1.float()).abs().argmin(-1)
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8), (exponents + 127).to(torch.uint8)


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers and factors of one matrix, with blocks of 128 x 128."""
    scales = torch.empty([math.ceil(size / 128) for size in weight.shape])
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            block = tuple(slice(128 * index, 128 * index + 128) for index in (row, column))
            scales[row, column] = weight[block].abs().max().float() / 448
            stored[block] = (weight[block].float() / scales[row, column]).to(stored.dtype)
    return stored, scales


def quantize(folder: Path, about: dict[str, Any]) -> Path:
    """Quantizes what published files have quantized: experts (mxfp4), or all products but the router's and the head's (fp8)."""
    written: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if about["quant_method"] == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            written[f"{name}_blocks"], written[f"{name}_scales"] = to_mxfp4(tensor)
        elif (about["quant_method"] == "fp8" and name.endswith("_proj.weight")) or "kv_a_proj" in name:
            written[name], written[f"{name}_scale_inv"] = to_fp8(tensor)
        else:
            written[name] = tensor.contiguous()
    names = sorted(written)  # scales and numbers in different files
    files = {f"model-{index}.safetensors": names[index::2] for index in range(2)}
    (folder / "model.safetensors").unlink()
    for file, inside in files.items():
        save_file({name: written[name].contiguous() for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    described = json.loads((folder / "config.json").read_text()) | {"quantization_config": about}
    (folder / "config.json").write_text(json.dumps(described))
    return folder
