"""Which layouts are compared, and that a model made small keeps its features. No rank is started."""

import dataclasses
from pathlib import Path

import pytest
from tokenyard.moe.param_count import count
from tokenyard.parallel.config import OWN_EXCHANGES, ParallelConfig, PipelineSchedule, Recompute
from tokenyard.parity.choose_layouts import DEGREES, Layout, all_layouts, is_legal, parse_layouts, prepare_config
from tokenyard.parity.command import plan_comparison
from tokenyard.parity.config import ParityConfig
from tokenyard.parity.shrink import shrink
from tokenyard.train.config.compose import CONF, compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.rules.rules import violations

MODELS = sorted(path.stem for path in Path(CONF / "model").glob("*.yaml"))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_can_be_made_small(model: str) -> None:
    given = prepare_config(compose([f"model={model}", "sequence_length=64"]))
    small = shrink(given, 4)
    assert next(violations(small, 1), None) is None
    assert count(small.model).total < 300_000
    before, after = given.model, small.model
    assert after.moe.top_k == min(before.moe.top_k, 8) and after.moe.router.groups == before.moe.router.groups
    kept = ("dense_first", "mtp_depth", "moe.shared_hidden", "moe.router.null_experts", "attention.window", "attention.mla.q_rank")
    for key in kept:
        values = [before, after]
        for name in key.split("."):
            values = [getattr(value, name) for value in values]
        assert bool(values[0]) == bool(values[1]), key
    kinds = [{(m.moe_layer(i), m.windowed_layer(i), m.linear_layer(i)) for i in range(m.layers)} for m in (before, after)]
    assert kinds[0] == kinds[1]
    assert (after.heads > after.kv_heads) == (before.heads > before.kv_heads)
    assert all_layouts(given, 2)


def test_automatic_layouts_cover_every_split_and_option() -> None:
    config = shrink(prepare_config(compose(["model=tiny_deepseek_v3"])), 4)
    layouts = all_layouts(config, 4)
    assert len({layout.text for layout in layouts}) == len(layouts)
    assert {layout.ranks for layout in layouts} == {1, 2, 4}
    assert all(is_legal(config, layout) for layout in layouts)
    for degree in [name for name in DEGREES if hasattr(ParallelConfig, name)]:
        assert {getattr(layout.parallel, degree) for layout in layouts} == {1, 2, 4}
    assert {layout.replicate for layout in layouts} == {1, 2, 4}
    assert {(layout.parallel.recompute, layout.accumulation) for layout in layouts} == {
        (recompute, accumulation) for recompute in Recompute for accumulation in (1, 2)
    }
    assert Layout(4, ParallelConfig(tensor=2, shard=2, expert=4)) in layouts
    side_by_side = {layout.parallel.pipeline_schedule for layout in layouts if layout.parallel.pipeline_overlap}
    assert side_by_side == {PipelineSchedule["interleaved"], PipelineSchedule["zbv"]}
    assert {layout.parallel.exchange for layout in layouts if layout.parallel.expert > 1} == set(OWN_EXCHANGES)
    assert Layout() not in layouts


def test_the_symmetric_exchange_has_room_for_everything() -> None:
    """One process drops nothing, so no layout may."""
    (layout,) = parse_layouts("[expert=4 exchange=symmetric]")
    assert layout.applied(Config()).parallel.exchange_rows == layout.parallel.expert == 4


def test_more_ranks_and_what_the_model_cannot() -> None:
    eight = plan_comparison(ParityConfig(ranks=8), ["model=tiny_deepseek_v3"])[1]
    assert {layout.ranks for layout in eight} == {1, 2, 4, 8} and any(layout.parallel.expert == 8 for layout in eight)
    assert all(layout.parallel.tensor <= 2 for layout in plan_comparison(ParityConfig(), ["model=tiny_mixtral"])[1])
    schedules = {layout.parallel.pipeline_schedule for layout in plan_comparison(ParityConfig(), ["model=mixtral_8x7b"])[1]}
    assert schedules == set(PipelineSchedule), "made small it has layers for all of them"
    dense = plan_comparison(ParityConfig(), ["model=dense"])[1]
    assert dense and all(layout.parallel.expert == 1 for layout in dense)


def test_listed_layouts() -> None:
    assert parse_layouts("[tensor=2 expert=2, shard=4 recompute, replicate=2 accumulation=2]") == [
        Layout(2, ParallelConfig(tensor=2, expert=2)),
        Layout(4, ParallelConfig(shard=4, recompute=Recompute.block)),
        Layout(2, ParallelConfig(), 2),
    ]
    config, layouts = plan_comparison(ParityConfig(layouts="[expert=4]"), ["model=tiny_mixtral"])
    assert [(layout.ranks, layout.text) for layout in layouts] == [(4, "replicate=4 expert=4")]
    assert parse_layouts(f"[{layouts[0].text}]")[0].text == layouts[0].text
    assert config.batch.sequences == 8


def test_without_shrinking_the_model_stays() -> None:
    config, layouts = plan_comparison(ParityConfig(shrink=False), ["model=tiny_mixtral", "batch.sequences=4"])
    assert config.model == compose(["model=tiny_mixtral"]).model and config.batch.sequences == 4
    assert dataclasses.replace(layouts[0]).applied(config).batch.sequences == 4
