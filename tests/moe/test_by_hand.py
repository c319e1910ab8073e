"""A model or a layer made by hand: the weights that a run begins with, refusals in one line, and what `repr` shows."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tokenyard
import torch
from tokenyard.moe import init
from tokenyard.moe.config import Activation, CapacityConfig, ModelConfig, MoEConfig, RouterConfig, Score
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.model import Transformer
from tokenyard.train.config.compose import compose
from tokenyard.train.setup import build_parallel

MODEL = ModelConfig(
    layers=3,
    width=16,
    heads=4,
    kv_heads=2,
    hidden=24,
    vocabulary=40,
    dense_first=1,
    mtp_depth=1,
    moe=MoEConfig(experts=4, hidden=8, shared_hidden=8, capacity=CapacityConfig(1.5)),
)
LAYER, IDS = MoELayer(MODEL), torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize("seed", [1, 5])
def test_weights_are_those_that_a_run_begins_with(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each of them is drawn once."""
    drawn, fill = Counter[str](), init.fill
    monkeypatch.setattr(init, "fill", lambda local, name, *rest: (drawn.update([name]), fill(local, name, *rest))[1])
    config = compose([f"seed={seed}", "precision=fp32"])
    config.model = MODEL
    expected = build_parallel(config, torch.device("cpu")).model.state_dict()
    assert dict(drawn) == dict.fromkeys(expected, 1)
    drawn.clear()
    found = Transformer(MODEL, seed=seed).state_dict()
    assert dict(drawn) == dict.fromkeys(expected, 1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert seed != 1 or all(torch.equal(tensor, found[name]) for name, tensor in Transformer(MODEL).state_dict().items())


def test_a_layer_is_that_of_a_block() -> None:
    blocks = Transformer(MODEL, seed=3).blocks
    for index in (1, 2):
        layer, expected = MoELayer(MODEL, seed=3, index=index).state_dict(), blocks[index].moe.state_dict()
        assert layer.keys() == expected.keys() and all(torch.equal(layer[name], expected[name]) for name in layer)
    assert MoELayer(MODEL).experts.down.dtype == torch.float32
    assert MoELayer(MODEL, torch.float64).experts.down.dtype == torch.float64
    assert not torch.equal(MoELayer(MODEL).router.weight, MoELayer(MODEL, index=1).router.weight)


def test_nothing_is_drawn_on_the_meta_device_or_without_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "words_of_rectangle", None)
    with torch.device("meta"):
        assert Transformer(MODEL).get_parameter("embedding.weight").is_meta
        assert MoELayer(MODEL).router.weight.is_meta
    Transformer(MODEL, seed=None)
    MoELayer(MODEL, seed=None)
    with pytest.raises(TypeError):
        MoELayer(MODEL)


def test_names_stand_for_members_of_enumerations() -> None:
    config = MoEConfig(activation="relu", router=RouterConfig(score="sigmoid"), capacity=CapacityConfig(1, scope="batch"))
    assert config.activation is Activation.relu and config.router.score is Score.sigmoid
    assert type(config.capacity.factor) is float and config == MoEConfig(
        activation=Activation.relu, router=RouterConfig(Score.sigmoid), capacity=CapacityConfig(1.0, scope=config.capacity.scope)
    )
    changed = ModelConfig(width=16, heads=2, kv_heads=1)
    changed.moe.router.score = "sigmoid"  # after its __post_init__
    assert Transformer(changed).blocks[0].moe.router.config.router.score is Score.sigmoid


CONFIGS: list[tuple[Callable[[], Any], str]] = [
    (lambda: ModelConfig(width="64"), "ModelConfig.width='64': must be an integer; nearest valid: width=64"),
    (lambda: ModelConfig(width=64.4), "ModelConfig.width=64.4: must be an integer; nearest valid: width=64"),
    (lambda: MoEConfig(experts=True), "MoEConfig.experts=True: must be an integer; nearest valid: experts=1"),
    (lambda: MoEConfig(dropout="a"), "MoEConfig.dropout='a': must be a number; nearest valid: dropout=0.0"),
    (
        lambda: ModelConfig(tie_embeddings=1),
        "ModelConfig.tie_embeddings=1: must be True or False; nearest valid: tie_embeddings=False",
    ),
    (lambda: CapacityConfig("2"), "CapacityConfig.factor='2': must be a number or None; nearest valid: factor=2.0"),
    (
        lambda: RouterConfig("sigmoids"),
        "RouterConfig.score='sigmoids': must be one of softmax, sigmoid, sqrtsoftplus; nearest valid: score='sigmoid'",
    ),
    (
        lambda: ModelConfig(moe={"experts": 4}),
        "ModelConfig.moe={'experts': 4}: must be an object of MoEConfig; nearest valid: moe=MoEConfig(experts=4)",
    ),
    (
        lambda: ModelConfig(dense_layers=[0.5]),
        "ModelConfig.dense_layers=[0.5]: must be a list, each item an integer; nearest valid: dense_layers=[]",
    ),
    (lambda: Transformer(ModelConfig(dropout=1)), "dropout=1.0: must be in [0, 1); nearest valid: dropout=0.0"),
    (lambda: Transformer(ModelConfig(layers=0)), "layers=0: must be in [1, 1024]; nearest valid: layers=1"),
    (
        lambda: MoELayer(ModelConfig(moe=MoEConfig(experts=4, top_k=5))),
        "moe.top_k=5: must be at most moe.experts=4; nearest valid: moe.top_k=4",
    ),
    (
        lambda: MoELayer(ModelConfig(moe=MoEConfig(experts=0))),
        "moe.experts=0: must be at least 1 in a layer with experts; nearest valid: moe.experts=1",
    ),
    (lambda: Transformer(ModelConfig(kv_heads=3)), "kv_heads=3: must divide heads=8; nearest valid: kv_heads=2"),
    (
        lambda: Transformer(ModelConfig(width=100)),
        "heads=8: must divide width=100 into heads of an even width; nearest valid: heads=10, kv_heads=10",
    ),
    (lambda: Transformer(MODEL)(IDS[0]), "ids_BS: has shape (3,), must be (B, S); nearest valid: ids_BS.unsqueeze(0)"),
    (lambda: Transformer(MODEL)(IDS + 40), "ids_BS: has the id 40, must be in [0, 40); nearest valid: ids_BS.clamp(0, 39)"),
    (lambda: LAYER(torch.ones(3, 16)), "x_BSD: has shape (3, 16), must be (B, S, 16); nearest valid: x_BSD.unsqueeze(0)"),
    (lambda: LAYER(torch.ones(1, 3, 8)), "x_BSD: has shape (1, 3, 8), must be (B, S, 16); nearest valid: torch.randn(2, 16, 16)"),
]
KINDS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: Transformer({"width": 64}),
        "config={'width': 64}, dict: must be a ModelConfig; nearest valid: Transformer(ModelConfig(width=64))",
    ),
    (
        lambda: Transformer("runs/first"),
        "config='runs/first', str: must be a ModelConfig; nearest valid: tokenyard.load_model('runs/first') "
        "if this is a run, a checkpoint or a Hugging Face folder",
    ),
    (
        lambda: MoELayer(MoEConfig(experts=4)),
        "MoEConfig: must be a ModelConfig; nearest valid: MoELayer(ModelConfig(width=128, moe=MoEConfig(experts=4, top_k=2)))",
    ),
    (
        lambda: Transformer(MODEL, "bf16"),
        "activations='bf16', str: must be a torch.dtype of floating-point numbers; nearest valid: activations=torch.bfloat16",
    ),
    (lambda: MoELayer(MODEL, torch.int64), "dtype=torch.int64, dtype: must be a torch.dtype of floating-point numbers"),
    (
        lambda: Transformer(MODEL)(IDS.float()),
        "ids_BS: has dtype torch.float32, must be torch.int64 or int32; nearest valid: ids_BS.long()",
    ),
    (lambda: Transformer(MODEL)([[1, 2]]), "ids_BS=[[1, 2]], list: must be a tensor of token ids, (B, S)"),
    (lambda: LAYER(torch.ones(1, 3, 16, dtype=torch.int64)), "x_BSD: has dtype torch.int64, must be one of floating-point numbers"),
    (lambda: LAYER([1.0]), "x_BSD=[1.0], list: must be a tensor (B, S, 16)"),
]


@pytest.mark.parametrize(("call", "says"), CONFIGS, ids=[says.partition(";")[0] for _, says in CONFIGS])
def test_a_value_is_refused_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == says


@pytest.mark.parametrize(("call", "says"), KINDS, ids=[says.partition(";")[0] for _, says in KINDS])
def test_another_kind_is_refused_in_one_line(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert says in str(caught.value) and "nearest valid: " in str(caught.value) and "\n" not in str(caught.value)


def test_repr_shows_shapes() -> None:
    model = Transformer(MODEL)
    numbers = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("mtp"))
    lines = [line.strip() for line in repr(model).splitlines()]
    assert lines[1].startswith(f"3 layers, width 16, vocabulary 40, {numbers:,} parameters, ") and lines[1].endswith(" float32")
    assert "(1 to 2): 2 x Block(" in lines and "(0): Block(" in lines
    assert "(k): Linear(16 -> 8)" in lines and "(router): Router(16 -> 4, top_k=2, softmax)" in lines
    assert "4 x (16 -> 8 -> 16), swiglu" in lines and "16 -> 24 -> 16, swiglu" in lines and "(head): LMHead(16 -> 40)" in lines
    of_layer = sum(parameter.numel() for parameter in LAYER.parameters())
    room = f"4 experts x 16 x 8, top_k=2, capacity 1.5 of scope sequence, {of_layer:,} parameters, float32"
    assert repr(LAYER).splitlines()[1].strip() == room
    assert ", dropless, " in repr(MoELayer(ModelConfig(width=16)))


def test_the_top_has_the_parts() -> None:
    assert tokenyard.MoELayer is MoELayer and tokenyard.Transformer is Transformer and tokenyard.ModelConfig is ModelConfig
    assert set(tokenyard.__all__) <= set(dir(tokenyard))
    assert all(getattr(tokenyard, name) is not None for name in tokenyard.__all__)
    with pytest.raises(AttributeError, match="'tokenyard' has no attribute 'MoeLayer'"):
        _ = tokenyard.MoeLayer
