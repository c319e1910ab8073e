"""`tokenyard params HF_FOLDER`: what a published config.json describes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from params_answers import asked, refused

PUBLISHED = json.loads((Path(__file__).parents[1] / "published.json").read_text())
"""By preset."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_counted_as_its_preset(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    found, preset = asked(capsys, str(tmp_path)), asked(capsys, f"model={name}", "sequence_length=4096")
    predicted = {"per_rank", "bytes_per_rank", "training_flops_per_token"}  # what has no weights here is not read
    different = {key for key in preset if found[key] != preset[key]}
    assert different - {"model", "parts", *(predicted if preset["parts"]["mtp"] else ())} == set()
    assert {**found["parts"], "mtp": 0} == {**preset["parts"], "mtp": 0}


def test_a_folder_with_a_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["mixtral_8x7b"]))
    found = asked(capsys, str(tmp_path), "parallel.expert=4", "sequence_length=128")
    assert (found["world"], found["sequence_length"]) == (4, 128)
    assert found["per_rank"]["experts"] * 4 == found["parts"]["experts"]


def test_a_dense_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3 8B: 8.03B parameters, by its card."""
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(llama))
    found = asked(capsys, str(tmp_path))
    assert (found["kind"], found["total"]) == ("dense", 8_030_261_248)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "config.json: "),
        ("[]", "must hold a JSON object"),
        ('{"architectures": ["BertModel"]}', "architectures=['BertModel']: must be one of"),
        (json.dumps(PUBLISHED["mixtral_8x7b"] | {"hidden_act": "gelu_new"}), "hidden_act='gelu_new'"),
        (json.dumps(PUBLISHED["mixtral_8x7b"] | {"flux_capacitor": 1}), "flux_capacitor=1: is not supported"),
    ],
)
def test_folders_that_cannot_be_read(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    assert says in refused(capsys, str(tmp_path))
    assert refused(capsys, str(tmp_path)).startswith(f"tokenyard: {tmp_path / 'config.json'}: ")


def test_auditing_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt_oss_20b"]))
    code = f"import sys; from tokenyard.launch.main import main; main(['params', {str(tmp_path)!r}]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert "20.9B total" in done.stdout
    assert done.stdout.endswith("False\n")
