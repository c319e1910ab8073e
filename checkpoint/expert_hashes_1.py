"""Hashes of experts as checkpoints of version 1 have them: to verify those.

The slice of one expert of one tensor is hashed as its bytes, row-major, as if the tensor were whole (xxh3-128). An expert's hash is
the xxh3-128 of a line `NAME HASH` for each of its tensors, sorted by name.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import xxhash

from ..parallel.shard import ShardMetadata
from .expert_hashes import EXPERT_TENSOR, WEIGHTS
from .safetensors_file import content_of
from .tensor_groups import TensorRecord
from .tensor_reader import TensorReader


def stored_hashes_1(folder: Path, tensors: Mapping[str, TensorRecord]) -> dict[str, dict[str, list[str]]]:
    """Returns by layer and kind (weights, exp_avg, exp_avg_sq) one hash for each expert, in the order of their ids.

    One slice is in memory at a time.
    """
    parts: dict[tuple[str, str], dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    with TensorReader(folder, tensors) as reader:
        for tensor, record in tensors.items():
            match = EXPERT_TENSOR.fullmatch(tensor)
            if match is None or 0 in record.shape:
                continue
            begin, sizes = (0,) * len(record.shape[1:]), (1, *record.shape[1:])
            for expert in range(record.shape[0]):
                content = content_of(reader.read(tensor, ShardMetadata(record.shape, (expert, *begin), sizes)))
                parts[match["layer"], match["moment"] or WEIGHTS][expert][match["name"]] = xxhash.xxh3_128_hexdigest(content)
    found: dict[str, dict[str, list[str]]] = {}
    for (layer, kind), experts in sorted(parts.items()):
        texts = [
            "".join(f"{name} {digest}\n" for name, digest in sorted(experts[expert].items())) for expert in range(len(experts))
        ]
        found.setdefault(layer, {})[kind] = [xxhash.xxh3_128_hexdigest(text.encode()) for text in texts]
    return found
