"""DeepSpeed's settings follow from the configuration; contradictions, and what DeepSpeed cannot do, are refused by name."""

import pytest
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.deepspeed_settings import ALLOWED_EXTRA, DECIDED_BY, deepspeed_settings
from tokenyard.train.config.serialize import config_from_plain, plain_config
from tokenyard.train.preflight import check_config

BAD = [
    # ranks, overrides, what the message begins with, the nearest valid value
    (1, "engine=deepspeed engine.zero=3", "engine.zero=3: must be 0, 1 or 2: DeepSpeed has no ZeRO-3 with experts",
     "engine.zero=2"),
    (1, "engine=deepspeed engine.zero=-1", "engine.zero=-1: must be in [0, 4)", "engine.zero=0"),
    (1, "engine.zero=1", "engine.zero=1: must be 0 with engine=torch", "engine.zero=0"),
    (1, "engine.extra={steps_per_print:5}", "engine.extra={steps_per_print:5}: must be {} with engine=torch", "engine.extra={}"),
    (1, "engine=deepspeed precision=fp64", "precision=fp64: must be fp32 or bf16 with engine=deepspeed", "precision=fp32"),
    (2, "engine=deepspeed parallel.shard=2", "parallel.shard=2: must be 1 with engine=deepspeed", "parallel.shard=1"),
    (1, "engine=deepspeed engine.extra={zero_optimization:{stage:1,overlap_comm:true}}",
     "engine.extra={zero_optimization:{stage:1,overlap_comm:true}}: zero_optimization.stage is decided by engine.zero",
     "engine.extra={zero_optimization:{overlap_comm:true}}"),
    (1, "engine=deepspeed engine.extra.optimizer.type=Adam",
     "engine.extra={optimizer:{type:Adam}}: optimizer.type is decided by optimizer", "engine.extra={}"),
    (1, "engine=deepspeed engine.extra={bf16:{enabled:true}}",
     "engine.extra={bf16:{enabled:true}}: bf16.enabled is decided by precision", "engine.extra={}"),
    (1, "engine=deepspeed engine.extra={zero_optimization:{overlap_com:true}}",
     "engine.extra={zero_optimization:{overlap_com:true}}: zero_optimization.overlap_com is none of the settings that it may hold, "
     "did you mean zero_optimization.overlap_comm", "engine.extra={}"),
    (1, "engine=deepspeed engine.extra={steps_per_print:true}",
     "engine.extra={steps_per_print:true}: steps_per_print must be an integer", "engine.extra={}"),
    (1, "engine=deepspeed engine.extra={zero_optimization:{}}",
     "engine.extra={zero_optimization:{}}: zero_optimization is none of the settings", "engine.extra={}"),
]  # fmt: skip


@pytest.mark.parametrize(("world", "overrides", "begin", "nearest"), BAD, ids=[each[1] for each in BAD])
def test_what_cannot_be_is_refused(world: int, overrides: str, begin: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(compose(overrides.split()), world)
    message = str(error.value)
    assert message.startswith(begin) and message.endswith(f"nearest valid: {nearest}")
    if not nearest.startswith("engine.extra"):  # mappings are merged, not replaced
        check_config(compose([*overrides.split(), nearest]), world)


def test_settings_follow_from_the_configuration() -> None:
    config = compose(["engine=deepspeed", "engine.zero=2", "batch.sequences=16", "batch.micro=2", "parallel.tensor=2"])
    config.engine.extra = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    check_config(config, 4)
    settings = deepspeed_settings(config, 4)
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (2, 1)
    assert settings["gradient_allreduce_op"] == "sum" and settings["gradient_clipping"] == 0.0
    zero = settings["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"], zero["compute_grad_norm"]) == (2, True, 1000, False)
    assert settings["wall_clock_breakdown"] is True


def test_without_micro_batches_a_rank_takes_all_its_sequences() -> None:
    settings = deepspeed_settings(compose(["engine=deepspeed", "batch.sequences=16"]), 2)
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (8, 1)


def test_nothing_is_both_open_and_decided() -> None:
    assert not [key for key in ALLOWED_EXTRA for owned in DECIDED_BY if key == owned or key.startswith(f"{owned}.")]


@pytest.mark.parametrize(
    "spelling",
    [
        "engine.extra={zero_optimization:{overlap_comm:true}}",
        "engine.extra.zero_optimization.overlap_comm=true",
        "+engine.extra.zero_optimization.overlap_comm=true",
    ],
)
def test_a_mapping_can_be_written_in_any_way_and_comes_back(spelling: str) -> None:
    config = compose(["engine=deepspeed", spelling])
    assert config.engine.extra == {"zero_optimization": {"overlap_comm": True}}
    assert config_from_plain(plain_config(config)) == config


def test_a_mapping_may_not_hold_a_target() -> None:
    for spelling in ("engine.extra={_target_:os.system}", "engine.extra.a._target_=os.system", "engine.extra={a:{_target_:x}}"):
        with pytest.raises(ConfigError, match="_target_"):
            compose(["engine=deepspeed", spelling])
