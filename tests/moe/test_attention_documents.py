"""Attention across documents: a packed sequence gives each document exactly what it gives alone."""

import pytest
import torch
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.token_info import documents_of, positions_of
from tokenyard.train.config.compose import compose

END = 2
PRESETS = ["tiny_mixtral", "tiny_deepseek_v2", "tiny_gpt_oss", "tiny_qwen3_moe", "tiny_qwen3_next"]
LENGTHS = (5, 1, 9, 4)


def packed() -> torch.Tensor:
    ids = torch.randint(3, 200, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    ids[0, torch.tensor(LENGTHS).cumsum(0) - 1] = END
    return ids


def test_documents_targets_and_positions() -> None:
    ids = packed()
    documents, targets = documents_of(ids, ids + 1, END, -100)
    assert documents[0].tolist() == [index for index, length in enumerate(LENGTHS) for _ in range(length)]
    assert positions_of(documents)[0].tolist() == [place for length in LENGTHS for place in range(length)]
    assert (targets == -100).tolist() == (ids == END).tolist()


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_documents_are_as_alone(preset: str) -> None:
    model = Transformer(compose([f"model={preset}"]).model, torch.float64)
    initialise(model, 1)
    model.eval()
    ids = packed()
    documents, _ = documents_of(ids, ids, END, -100)
    with torch.no_grad():
        together = model(ids, documents_BS=documents)[0]
        alone = torch.cat([model(part)[0] for part in ids.split(list(LENGTHS), dim=1)])
        across = model(ids)[0]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    assert (across - alone).abs().max() > 1e-4
