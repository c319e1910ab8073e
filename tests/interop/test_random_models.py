"""Some random models of each family; `make hf` compares more."""

from pathlib import Path

import pytest
from random_models import MOST_DYNAMIC, Different, refused_key, run_family
from tokenyard.interop.families import FAMILIES

NAMES = [name.removesuffix("ForCausalLM") for name in FAMILIES]


@pytest.mark.parametrize("family", NAMES)
def test_two_random_models(family: str) -> None:
    pytest.importorskip("transformers")
    failures: list[str] = []
    row = run_family(family, 2, seed=3, failures=failures)
    assert failures == [] and row.cases == 2 and 0 < row.exact <= MOST_DYNAMIC and 0 < row.single < 1e-3


def test_a_refusal_must_name_a_key_of_the_file_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"rope_parameters": {}, "clip_qkv": 2.0}')
    assert refused_key("x/config.json: clip_qkv=2.0: must be None", tmp_path) == "clip_qkv"
    assert refused_key("x/config.json: rope_parameters.rope_type='a': must be b", tmp_path) == "rope_parameters.rope_type"
    for said in ("x/config.json: clip_qkv=2.0:\nmust be None", "x/config.json: other=2.0: must be None", "no"):
        with pytest.raises(Different):
            refused_key(said, tmp_path)
